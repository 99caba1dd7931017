-- The Envoys that are connected to each sidecar, and what they have. Unlogged: each sidecar writes its own anew every second.
create unlogged table abreast.replica (
    id uuid primary key, -- of one run of a sidecar
    sidecar text not null, -- its host and the port of its gRPC
    seen timestamptz not null, -- its last sign of life
    -- [{service, node, peer, number, acknowledged_at, acknowledged_version, answered_at, answered_version, after, error}]
    envoys jsonb not null
);

-- The clock may be set back: what was seen long after now is as stale as what was seen long before.
create function abreast.is_alive(seen timestamptz, expires float8) returns boolean language sql as
    'select abs(extract(epoch from clock_timestamp() - seen)) <= expires';
