create schema if not exists abreast;

-- An endpoint is a method and a route template of one service. The counters are what its findings' are held against;
-- `judged_*` is what they were when `state` of its findings was last decided.
create table abreast.endpoint (
    id integer generated always as identity primary key,
    service text not null,
    method text not null,
    route text not null,
    compared bigint not null default 0, -- pairs of old and new
    baseline_compared bigint not null default 0, -- pairs of old and old
    judged_compared bigint not null default 0,
    judged_baseline bigint not null default 0,
    unique (service, method, route)
) with (fillfactor = 70);

-- All differences with one cause. Counters are only for ordering and for `state`; windows are answered from pairs.
create table abreast.finding (
    id bigint generated always as identity primary key,
    endpoint_id integer not null references abreast.endpoint,
    part text not null, -- status, header, body, error, latency
    path text not null, -- generalised: $.items[*].price, a header's name, or empty
    kind text not null, -- added, removed, changed, type, order, ...
    impact text not null, -- breaking, value, additive
    count bigint not null default 0, -- pairs of old and new that show it
    baseline_count bigint not null default 0, -- pairs of old and old that show it
    explained bigint not null default 0, -- of `count`, those in which the shapes of all its values explain it
    new_greater bigint not null default 0, -- of `count`, by the first value; absent and null are the least
    new_smaller bigint not null default 0,
    state text not null default 'undecided', -- real, noise, undecided: decided from the counters, now and then
    reason text not null default '', -- why; empty until it was decided for the first time
    first_seen timestamptz not null,
    last_seen timestamptz not null,
    -- Of latency: {old_p50_us, new_p50_us, old_p99_us, new_p99_us, ratio, pairs}. Of all else the values that were
    -- seen first, as JSON text or null: {place, old, new}.
    detail jsonb not null default '{}',
    unique (endpoint_id, part, path, kind)
) with (fillfactor = 70); -- counters change all the time: room on the page spares the index

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
    primary key (id, day)
) partition by range (day);

create index pair_at on abreast.pair (at);
create index pair_endpoint_at on abreast.pair (endpoint_id, at);
create index pair_outcome_at on abreast.pair (outcome, at) where outcome <> 'match';
create index pair_findings on abreast.pair using gin (findings) where findings <> '{}';

-- How many rows `pair` ever got. Written together with them, and kept when a day's pairs are dropped.
create table abreast.tally (
    service text not null,
    day date not null,
    outcome text not null,
    pairs bigint not null,
    primary key (service, day, outcome)
) with (fillfactor = 70);

-- Partitions are named pair_YYYYMMDD. Attaching, unlike `partition of`, lets readers and writers of other days go on.
create function abreast.open_day(wanted date) returns void language plpgsql as $$
declare
    name text := 'pair_' || to_char(wanted, 'YYYYMMDD');
begin
    perform pg_advisory_xact_lock(hashtext('abreast.open_day'));
    if to_regclass('abreast.' || name) is null then
        execute format('create table abreast.%I (like abreast.pair including all excluding indexes)', name);
        execute format('alter table abreast.pair attach partition abreast.%I for values from (%L) to (%L)',
                       name, wanted, wanted + 1);
    end if;
end $$;

-- Waits a second at most for those who use the table, since all others would wait behind it.
create function abreast.drop_day(wanted date) returns void language plpgsql as $$
begin
    perform set_config('lock_timeout', '1s', true);
    execute format('drop table if exists abreast.%I', 'pair_' || to_char(wanted, 'YYYYMMDD'));
    delete from abreast.example where day <= wanted;
end $$;

-- A bounded number of pairs a finding is kept whole.
create table abreast.example (
    day date not null,
    pair_id text not null,
    captures bytea not null, -- zstd of the captures as services sent them, each after its length (4 bytes, big-endian)
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

create index example_finding on abreast.finding_example (day, pair_id);

-- What service processes and shards last said of themselves: cumulative, so that saying it twice changes nothing.
-- A shard's: {received, duplicate, late, shed_pairs, shed_bytes, joined, swept: captures or pairs since ever, over
-- restarts of Redis too; waiting, ready, bytes: now; life, base, last: how the sums are made}.
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

-- What Envoys counted, per node (its id and admin address): cumulative over their restarts.
-- `counted` is {sampled: requests; old_shadow, new_shadow, old_baseline: copies meant for each; not_sent: of those the
-- ones that never left Envoy}; `last` has the same of the running one since its start, and when it was asked.
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
