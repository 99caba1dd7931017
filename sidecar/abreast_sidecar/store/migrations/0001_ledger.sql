create schema if not exists abreast;

-- An endpoint is a method and a route template of one service.
create table abreast.endpoint (
    id integer generated always as identity primary key,
    service text not null,
    method text not null,
    route text not null,
    unique (service, method, route)
);

-- All differences with one cause. Counters are only for ordering and for `state`; windows are answered from pairs.
create table abreast.finding (
    id bigint generated always as identity primary key,
    endpoint_id integer not null references abreast.endpoint,
    part text not null, -- status, header, body, error, latency
    path text not null, -- generalised: $.items[*].price, a header's name, or empty
    kind text not null, -- added, removed, changed, type, order, ...
    impact text not null, -- breaking, value, additive
    count bigint not null default 0, -- pairs of old and new that show it
    baseline_count bigint not null default 0, -- pairs of old and old that show the same path: it is noise
    first_seen timestamptz not null,
    last_seen timestamptz not null,
    detail jsonb not null default '{}', -- what a kind needs beside: statuses, percentiles
    unique (endpoint_id, part, path, kind)
);

-- One row for every sampled request, however it ended. `day` is the UTC day of the entry in Redis's stream, which
-- stays the same when an entry is delivered again: the primary key makes such a pair count once.
create table abreast.pair (
    day date not null,
    id text not null,
    at timestamptz not null, -- the entry in Redis's stream, by Redis's clock
    endpoint_id integer not null,
    outcome text not null,
    live text, -- which version answered the user: old or new
    request text not null default '', -- path and query
    old_status smallint,
    new_status smallint,
    old_us integer, -- total time, µs
    new_us integer,
    old_release text not null default '',
    new_release text not null default '',
    findings bigint[] not null default '{}', -- of old against new
    baseline boolean, -- whether a baseline copy was compared, and if so whether it differed
    noise bigint[] not null default '{}', -- findings' paths that old against old showed too
    reason text not null default '', -- why it was swept, undecodable, …
    primary key (day, id)
) partition by range (day);

create index pair_at on abreast.pair (at);
create index pair_endpoint_at on abreast.pair (endpoint_id, at);
create index pair_id on abreast.pair (id);
create index pair_outcome_at on abreast.pair (outcome, at) where outcome <> 'match';
create index pair_findings on abreast.pair using gin (findings) where findings <> '{}';

-- A bounded number of pairs a finding is kept whole.
create table abreast.example (
    day date not null,
    pair_id text not null,
    captures bytea not null, -- zstd of length-prefixed captures, as services sent them
    differences jsonb not null, -- [{part, path, place, kind, impact, old, new}]
    primary key (day, pair_id)
);

create table abreast.finding_example (
    finding_id bigint not null references abreast.finding on delete cascade,
    day date not null,
    pair_id text not null,
    size integer not null, -- bytes of both answers' bodies
    primary key (finding_id, day, pair_id),
    foreign key (day, pair_id) references abreast.example on delete cascade
);

-- Entries that could not be read at all, kept apart with the reason.
create table abreast.poison (
    id bigint generated always as identity primary key,
    at timestamptz not null,
    service text not null,
    entry text not null, -- id in Redis's stream
    reason text not null,
    content bytea not null,
    unique (service, entry)
);

-- What service processes and shards last said of themselves: cumulative, so that saying it twice changes nothing.
create table abreast.process_report (
    id text primary key,
    service text not null,
    seen timestamptz not null,
    report jsonb not null
);

create table abreast.shard_report (
    service text not null,
    shard integer not null,
    seen timestamptz not null,
    report jsonb not null,
    primary key (service, shard)
);

-- What Envoys counted, per node: cumulative over their restarts (`last` is the raw value of the running one).
create table abreast.envoy_report (
    node text not null,
    service text not null,
    seen timestamptz not null,
    counted jsonb not null,
    last jsonb not null,
    primary key (node, service)
);

create table abreast.traffic (
    service text primary key,
    version bigint not null default 1, -- grows with every change
    new_share integer not null, -- hundredths of a percent, 0 to 10000
    sample_safe integer not null, -- millionths, 0 to 1000000
    sample_unsafe integer not null,
    baseline_share integer not null, -- millionths of the sampled safe requests
    rolled_back boolean not null default false,
    updated_at timestamptz not null default now(),
    check (new_share between 0 and 10000),
    check (sample_safe between 0 and 1000000),
    check (sample_unsafe between 0 and 1000000),
    check (baseline_share between 0 and 1000000)
);

create table abreast.traffic_event (
    id bigint generated always as identity primary key,
    service text not null,
    at timestamptz not null default now(),
    actor text not null,
    action text not null, -- create, update, rollback, promote
    reason text not null,
    before jsonb,
    after jsonb not null
);

create index traffic_event_service on abreast.traffic_event (service, id desc);
