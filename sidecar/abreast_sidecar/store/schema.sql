-- The ledger, as a new database gets it. Later versions are forward-only files in migrations/.

create schema if not exists abreast;

-- Versions of the schema, one row for each applied file. Version 1 is this file.
create table abreast.schema_version (
    version integer primary key,
    name text not null,
    applied_at timestamptz not null default clock_timestamp(),
    digest text not null -- SHA-256 of the file
);

-- Endpoints and findings

-- A method and a route template of one service. The worker updates the counters with each batch.
create table abreast.endpoint (
    id integer generated always as identity primary key,
    service text not null,
    method text not null,
    route text not null,
    source text not null default '', -- source of the route: middleware, configured, openapi, learned, path, grpc, graphql
    compared bigint not null default 0, -- compared pairs of old and new
    baseline_compared bigint not null default 0, -- compared pairs of old and old
    -- Both counters when the noise job last classified the findings; -1 makes it classify them again.
    classified_compared bigint not null default 0,
    classified_baseline bigint not null default 0,
    unique (service, method, route)
) with (fillfactor = 70); -- counters change often: free space on the page saves index updates

-- Return the pool of an endpoint. While endpoints have few pairs, those of a pool are classified together: they have the
-- service, the method, the number of path segments, and the first of several segments in common.
create function abreast.get_pool(e abreast.endpoint) returns text language sql immutable as $$
    select concat_ws(
        ' ', e.service, e.method, array_length(string_to_array(e.route, '/'), 1),
        case when e.route like '/%/%' then split_part(e.route, '/', 2) end
    )
$$;

create function abreast.is_safe(method text) returns boolean language sql immutable as $$
    select method in ('GET', 'HEAD', 'OPTIONS')
$$;

-- Return true for requests to a GraphQL path that are not one readable query: mutations, subscriptions and batches. A
-- sampling rule of queries sends no copies of them.
create function abreast.is_not_query(e abreast.endpoint) returns boolean language sql immutable as $$
    select e.method = 'POST'
       and case when e.source = 'graphql' then e.route !~ ' query( [^ ]+)?$' else e.route ~ '/(graphql|gql)/?$' end
$$;

-- Templates of routes of services without the middleware. A change is a new version of the rules, so that all workers use
-- the same templates.
create table abreast.endpoint_template (
    source text not null, -- configured, openapi, learned
    service text not null, -- empty: all
    method text not null, -- empty: all
    path text not null, -- a template: /users/{name}; learned: /users/{id}, or a value that stays as it is: /users/me
    primary key (source, service, method, path)
);

-- Labels of code. The later of two releases has the greater id.
create table abreast.release (
    id integer generated always as identity primary key,
    service text not null,
    version text not null, -- old, new
    label text not null, -- empty if the service sends none
    first_seen timestamptz not null default clock_timestamp(),
    unique (service, version, label)
);

-- All differences with one cause. `state` is a statistical decision; `status` is a decision of people.
-- Counters serve order and `state`; a listing of a window counts pairs. Counters of single pairs are sums over
-- finding_release. Only CounterDeltas.write_findings changes both.
create table abreast.finding (
    id bigint generated always as identity primary key,
    endpoint_id integer not null references abreast.endpoint,
    part text not null, -- status, header, body, effect, error, latency, cache
    path text not null, -- generalised: $.items[*].price, the name of a header, or empty
    kind text not null, -- added, removed, changed, type, order, ...
    impact text not null, -- breaking, value, additive
    count bigint not null default 0, -- pairs of old and new that show it
    baseline_count bigint not null default 0, -- pairs of old and old that show it
    shape_explained bigint not null default 0, -- part of `count`: value shapes explain every difference
    -- Bets of clients on the direction of the first value if old answered the user; absent and null are the least.
    copy_greater_of_new bigint not null default 0,
    copy_smaller_of_new bigint not null default 0,
    -- Consecutive pairs of one worker: how often it compared, and how often a version repeated a recent value.
    repeat_checks bigint not null default 0,
    old_repeats bigint not null default 0,
    new_repeats bigint not null default 0,
    -- Bets on triples: one copy has the greater value, and the live response is not outside of both (stats/noise.py).
    other_above bigint not null default 0,
    other_below bigint not null default 0,
    same_above bigint not null default 0,
    same_below bigint not null default 0,
    -- The same version's copy has a greater or smaller value than the live response.
    same_rises bigint not null default 0,
    same_falls bigint not null default 0,
    -- Bets on triples: only the copy of the other version differs from the live response, or only that of the same version.
    other_only bigint not null default 0,
    same_only bigint not null default 0,
    copy_greater_of_old bigint not null default 0, -- bets on the direction if new answered the user
    copy_smaller_of_old bigint not null default 0,
    drift_count bigint not null default 0, -- pairs that a recheck explained as drift of state; not in `count`
    state text not null default 'undecided', -- real, noise, undecided
    reason text not null default '', -- reason for `state`; empty before the first decision
    status text not null default 'open'
        check (status in ('open', 'confirmed', 'expected', 'fixed', 'reopened')),
    status_since timestamptz, -- null: nobody has set a status
    fixed_after integer, -- the last release of new that may show a fixed finding; a later one reopens it
    examples_replaced integer not null default 0, -- examples that smaller ones replaced
    first_seen timestamptz not null,
    last_seen timestamptz not null,
    -- Latency: {old_p50_us, new_p50_us, old_p99_us, new_p99_us, ratio, pairs}.
    -- Other parts: {exact_path, old, new} of the first pair, values as JSON text or null.
    detail jsonb not null default '{}',
    unique (endpoint_id, part, path, kind)
) with (fillfactor = 70);

-- Changes of a finding's status.
create table abreast.finding_event (
    id bigint generated always as identity primary key,
    finding_id bigint not null references abreast.finding on delete cascade,
    at timestamptz not null default clock_timestamp(),
    actor text not null, -- a person, or `abreast` for an automatic reopening
    before text not null, -- status
    after text not null,
    release text not null default '', -- the release of new that fixes it, or showed it again
    reason text not null
);

create index finding_event_finding on abreast.finding_event (finding_id, id desc);

-- Counters of endpoints by release ids (0: that version has no capture), so that earlier releases don't dilute a
-- new one. Baseline pairs count for the release of old.
create table abreast.endpoint_release (
    endpoint_id integer not null references abreast.endpoint,
    old_release integer not null,
    new_release integer not null,
    compared bigint not null default 0,
    baseline_compared bigint not null default 0,
    primary key (endpoint_id, old_release, new_release)
) with (fillfactor = 70);

-- Counters of findings by release ids, as in endpoint_release: of pairs that no rule explains (rule 0), and of pairs that
-- a rule explains. The latter return to the finding when the rule ends.
create table abreast.finding_release (
    rule_id integer not null,
    finding_id bigint not null references abreast.finding on delete cascade,
    old_release integer not null,
    new_release integer not null,
    count bigint not null default 0,
    baseline_count bigint not null default 0,
    shape_explained bigint not null default 0,
    copy_greater_of_new bigint not null default 0,
    copy_smaller_of_new bigint not null default 0,
    repeat_checks bigint not null default 0,
    old_repeats bigint not null default 0,
    new_repeats bigint not null default 0,
    other_above bigint not null default 0,
    other_below bigint not null default 0,
    same_above bigint not null default 0,
    same_below bigint not null default 0,
    same_rises bigint not null default 0,
    same_falls bigint not null default 0,
    other_only bigint not null default 0,
    same_only bigint not null default 0,
    copy_greater_of_old bigint not null default 0,
    copy_smaller_of_old bigint not null default 0,
    unknown bigint not null default 0, -- pairs from before the rule without stored responses
    first_seen timestamptz not null,
    last_seen timestamptz not null,
    primary key (finding_id, rule_id, old_release, new_release)
) with (fillfactor = 70);

create index finding_release_rule on abreast.finding_release (rule_id) where rule_id <> 0;

-- Add to the counters. `rows`: JSON objects with the columns as keys. The caller has locked the findings.
create function abreast.add_finding_counts(rows json) returns void language sql as $$
    insert into abreast.finding_release as stored -- all columns, in their order
    select rule_id, finding_id, old_release, new_release, sum(count), sum(baseline_count), sum(shape_explained),
           sum(copy_greater_of_new), sum(copy_smaller_of_new), sum(repeat_checks), sum(old_repeats), sum(new_repeats),
           sum(other_above), sum(other_below), sum(same_above), sum(same_below),
           sum(same_rises), sum(same_falls),
           sum(other_only), sum(same_only), sum(copy_greater_of_old), sum(copy_smaller_of_old), sum(unknown),
           min(first_seen), max(last_seen)
    from json_populate_recordset(null::abreast.finding_release, rows)
    group by finding_id, rule_id, old_release, new_release
    order by finding_id, rule_id, old_release, new_release
    on conflict (finding_id, rule_id, old_release, new_release) do update
    set count = stored.count + excluded.count, baseline_count = stored.baseline_count + excluded.baseline_count,
        shape_explained = stored.shape_explained + excluded.shape_explained,
        copy_greater_of_new = stored.copy_greater_of_new + excluded.copy_greater_of_new,
        copy_smaller_of_new = stored.copy_smaller_of_new + excluded.copy_smaller_of_new,
        repeat_checks = stored.repeat_checks + excluded.repeat_checks,
        old_repeats = stored.old_repeats + excluded.old_repeats,
        new_repeats = stored.new_repeats + excluded.new_repeats,
        other_above = stored.other_above + excluded.other_above,
        other_below = stored.other_below + excluded.other_below,
        same_above = stored.same_above + excluded.same_above,
        same_below = stored.same_below + excluded.same_below,
        same_rises = stored.same_rises + excluded.same_rises,
        same_falls = stored.same_falls + excluded.same_falls,
        other_only = stored.other_only + excluded.other_only, same_only = stored.same_only + excluded.same_only,
        copy_greater_of_old = stored.copy_greater_of_old + excluded.copy_greater_of_old,
        copy_smaller_of_old = stored.copy_smaller_of_old + excluded.copy_smaller_of_old,
        unknown = stored.unknown + excluded.unknown, first_seen = least(stored.first_seen, excluded.first_seen),
        last_seen = greatest(stored.last_seen, excluded.last_seen)
$$;

-- Request features without bodies: names of parameters, headers and body fields with short values. Each endpoint keeps
-- a random sample, and each finding some requests that show it. Later requests reuse the slots.
create table abreast.request_sample (
    endpoint_id integer not null references abreast.endpoint,
    finding_id bigint not null, -- 0: any request of the endpoint
    slot smallint not null,
    at timestamptz not null,
    findings bigint[] not null,
    features jsonb not null, -- {name: [values]}
    client bigint, -- hash of the identity; null without one
    primary key (endpoint_id, finding_id, slot)
) with (fillfactor = 70);

-- Open regressions count against a verdict: neither noise nor additive unless confirmed, and neither expected nor fixed.
create function abreast.is_open_regression(f abreast.finding) returns boolean language sql immutable as $$
    select (f.status = 'confirmed' or (f.impact <> 'additive' and f.state <> 'noise'))
       and f.status not in ('expected', 'fixed')
$$;

-- Detectors report these findings from many pairs. No single pair shows one, and the noise job leaves them alone.
create function abreast.is_aggregate(f abreast.finding) returns boolean language sql immutable as $$
    select f.part in ('latency', 'cache') or f.path = 'no capture'
$$;

-- Pairs

-- One row for each sampled request, by its outcome. `day` is the UTC day of the entry in Redis's stream. A second
-- delivery has the same day, so the primary key counts the pair once.
create table abreast.pair (
    day date not null,
    id text not null,
    at timestamptz not null, -- time of the entry, by Redis's clock
    endpoint_id integer not null,
    outcome text not null,
    live text, -- the version that answered the user: old, new
    left_by bigint, -- hash of the user who left before a response began; null: none did
    failed_over boolean not null default false, -- new failed first, then old answered the user; `live` is old
    request text not null default '', -- path and query
    old_status smallint,
    new_status smallint,
    old_us integer, -- total time in µs
    new_us integer,
    baseline_us integer, -- time of old for the baseline copy, if old also answered the user
    waits_match boolean, -- both responses met the same load of their process; null: not both have times
    baseline_waits_match boolean, -- the same of new's response and old's baseline copy
    old_in_flight smallint, -- other requests in the process at the arrival
    new_in_flight smallint,
    old_release text not null default '',
    new_release text not null default '',
    old_hits integer, -- cache lookups, if the version reported any
    old_misses integer,
    new_hits integer,
    new_misses integer,
    baseline_differs boolean, -- a baseline copy differed; null: none was compared
    findings bigint[] not null default '{}', -- ids; old against new, not explained by rules
    explained bigint[], -- findings that rules explain, with the rule at the same index
    explained_by integer[],
    baseline_findings bigint[] not null default '{}', -- the same for old against old
    baseline_explained bigint[],
    baseline_explained_by integer[],
    drift bigint[], -- findings that a recheck explained as drift of state
    -- {finding: the other counters that the pair adds to}; bits in the order of finding's columns: 1 shape_explained, ...,
    -- 8192 copy_smaller_of_old
    marks jsonb,
    rules_version bigint, -- version of the rules at the comparison; null: there were none
    reason text not null default '', -- details of the outcome
    primary key (id, day)
) partition by range (day);

-- Keys of recent bets: hashes of a finding, a client and a period. Unlogged: after a crash of Postgres, the clients of one
-- period may bet twice.
create unlogged table abreast.bet (
    key bigint primary key,
    at timestamptz not null default now()
);

-- Check that a pair counts for a release of new; null: for all. Pairs without a label count for the release of their time:
-- Envoy captures users who leave, and responses from outside of the middleware.
create function abreast.is_of_release(label text, at timestamptz, release text, start timestamptz, stop timestamptz)
returns boolean language sql immutable as $$
    select release is null or label = release
        or (label = '' and at >= coalesce(start, '-infinity') and at < coalesce(stop, 'infinity'))
$$;

-- A server error, or no response.
create function abreast.is_error(status smallint) returns boolean language sql immutable as $$
    select coalesce(status, 0) not between 1 and 499
$$;

create index pair_at on abreast.pair (at);
create index pair_error_at on abreast.pair (endpoint_id, at)
    where abreast.is_error(old_status) <> abreast.is_error(new_status);
create index pair_endpoint_at on abreast.pair (endpoint_id, at);
create index pair_outcome_at on abreast.pair (outcome, at) where outcome <> 'match';
create index pair_findings on abreast.pair using gin (findings) where findings <> '{}';
create index pair_baseline_findings on abreast.pair using gin (baseline_findings) where baseline_findings <> '{}';
create index pair_explained on abreast.pair using gin (explained) where explained is not null;
create index pair_explained_by on abreast.pair using gin (explained_by) where explained_by is not null;
create index pair_baseline_explained_by on abreast.pair using gin (baseline_explained_by) where baseline_explained_by is not null;
create index pair_drift on abreast.pair using gin (drift) where drift is not null;
-- Few pairs show or hide a finding: a listing of a window reads only those.
create index pair_showing_at on abreast.pair (at) where findings <> '{}';
create index pair_hidden_at on abreast.pair (at) where explained is not null or drift is not null;

-- Totals of pairs by service, day and outcome. Retention folds dropped days into one row at -infinity.
create table abreast.outcome_count (
    service text not null,
    day date not null,
    outcome text not null,
    pairs bigint not null,
    primary key (service, day, outcome)
) with (fillfactor = 70);

-- The last day that retention dropped. A pair of such a day is rejected, because the ledger can't know it any more and
-- would count it twice.
create table abreast.retention_state (
    singleton boolean primary key default true check (singleton),
    dropped_until date not null
);

insert into abreast.retention_state (dropped_until) values ('-infinity');

-- Entries rejected because their day is dropped. The ledger may have counted some of them before.
create table abreast.late_entry (
    service text primary key,
    entries bigint not null
);

-- Open a day's partition, named pair_YYYYMMDD. Return false for a dropped day. Attaching a table, unlike `partition of`,
-- does not block other days.
create function abreast.open_day(target date) returns boolean language plpgsql
    security definer set search_path = pg_catalog, pg_temp -- a role without the right to create tables opens days
as $$
declare
    name text := 'pair_' || to_char(target, 'YYYYMMDD');
begin
    perform pg_advisory_xact_lock(hashtext('abreast.open_day'));
    if target <= (select dropped_until from abreast.retention_state) then
        return false;
    end if;
    if to_regclass('abreast.' || name) is null then
        execute format('create table abreast.%I (like abreast.pair including all excluding indexes)', name);
        execute format('alter table abreast.pair attach partition abreast.%I for values from (%L) to (%L)',
                       name, target, target + 1);
    end if;
    return true;
end $$;

-- Pair counts by hour (UTC) and by all columns that a listing or a verdict counts, so that a window needs few rows.
-- Triggers on `pair` keep it; it is dropped with its day.
create table abreast.hourly_count (
    endpoint_id integer not null,
    hour timestamptz not null, -- its start
    outcome text not null,
    old_release text not null,
    new_release text not null,
    old_status smallint,
    new_status smallint,
    findings_digest bytea not null, -- digest of the next four columns, for the key
    findings bigint[] not null, -- sorted
    explained bigint[],
    explained_by integer[],
    drift bigint[],
    pairs bigint not null, -- 0 after all of them changed
    first timestamptz not null,
    last timestamptz not null,
    constraint hourly_count_key unique nulls not distinct
        (endpoint_id, hour, outcome, old_release, new_release, old_status, new_status, findings_digest)
) with (fillfactor = 70);

create index hourly_count_hour on abreast.hourly_count (hour);

create function abreast.sort_distinct(bigint[]) returns bigint[] language sql immutable as $$
    select case when cardinality($1) < 2 then $1 else array(select distinct unnest($1) order by 1) end
$$;

-- Build the statement that adds pairs to the hourly counts, or subtracts them with a sign of -1. A fixed order prevents
-- deadlocks between workers.
create function abreast.hourly_count_statement(source text) returns text language sql immutable as $$
    select format($f$
        insert into abreast.hourly_count as stored (
            endpoint_id, hour, outcome, old_release, new_release, old_status, new_status, findings_digest, findings,
            explained, explained_by, drift, pairs, first, last
        )
        select endpoint_id, hour, outcome, old_release, new_release, old_status, new_status,
               case when findings = '{}' and explained is null and drift is null then ''
                    else sha256(convert_to(row(findings, explained, explained_by, drift)::text, 'UTF8')) end
                    as findings_digest,
               findings, explained, explained_by, drift, sum(sign), min(at), max(at)
        from (
            select sign, endpoint_id, date_trunc('hour', at, 'UTC') as hour, outcome, old_release, new_release,
                   old_status, new_status, abreast.sort_distinct(findings) as findings, explained, explained_by, drift, at
            from (%s) as changed
        ) as changes
        group by endpoint_id, hour, outcome, old_release, new_release, old_status, new_status, findings, explained,
                 explained_by, drift
        having sum(sign) <> 0
        order by endpoint_id, hour, outcome, old_release, new_release, old_status, new_status, findings_digest
        on conflict on constraint hourly_count_key do update
        set pairs = stored.pairs + excluded.pairs, first = least(stored.first, excluded.first),
            last = greatest(stored.last, excluded.last)
    $f$, source)
$$;

-- Create a trigger on `pair` that runs the statement. Sessions keep its plan, unlike that of `execute`.
create function abreast.create_hourly_trigger(event text, transition text, source text) returns void language plpgsql as $$
begin
    execute format('create function abreast.%I() returns trigger language plpgsql as %L', 'count_hourly_' || event,
                   'begin ' || abreast.hourly_count_statement(source) || '; return null; end');
    execute format('create trigger %I after %s on abreast.pair referencing %s for each statement execute function abreast.%I()',
                   'pair_' || event, event, transition, 'count_hourly_' || event);
end $$;

select abreast.create_hourly_trigger('insert', 'new table as inserted', 'select 1 as sign, * from inserted'),
       abreast.create_hourly_trigger('delete', 'old table as deleted', 'select -1 as sign, * from deleted'),
       abreast.create_hourly_trigger('update', 'new table as inserted old table as deleted',
                                     'select 1 as sign, * from inserted union all select -1, * from deleted');

-- Return the counts of a window: hourly counts of its whole hours, and pairs of the partial hours at both ends.
create function abreast.pair_counts(endpoints integer[], start timestamptz, stop timestamptz) returns table (
    endpoint_id integer, outcome text, old_release text, new_release text, old_status smallint, new_status smallint,
    findings bigint[], explained bigint[], explained_by integer[], drift bigint[], pairs bigint, first timestamptz,
    last timestamptz
) language sql stable as $$
    select h.endpoint_id, h.outcome, h.old_release, h.new_release, h.old_status, h.new_status, h.findings, h.explained,
           h.explained_by, h.drift, h.pairs, h.first, h.last
    from abreast.hourly_count h
    where h.endpoint_id = any(endpoints)
      and h.hour >= date_trunc('hour', coalesce(start, '-infinity') + interval '3599.999999 seconds', 'UTC')
      and h.hour < date_trunc('hour', coalesce(stop, 'infinity'), 'UTC')
    union all
    select p.endpoint_id, p.outcome, p.old_release, p.new_release, p.old_status, p.new_status, p.findings, p.explained,
           p.explained_by, p.drift, 1, p.at, p.at
    from abreast.pair p
    where p.endpoint_id = any(endpoints)
      and p.at >= start and p.day >= (start at time zone 'UTC')::date
      and p.at < least(stop, date_trunc('hour', start + interval '3599.999999 seconds', 'UTC'))
      and p.day <= (least(stop, date_trunc('hour', start + interval '3599.999999 seconds', 'UTC')) at time zone 'UTC')::date
    union all
    select p.endpoint_id, p.outcome, p.old_release, p.new_release, p.old_status, p.new_status, p.findings, p.explained,
           p.explained_by, p.drift, 1, p.at, p.at
    from abreast.pair p
    where p.endpoint_id = any(endpoints)
      and p.at < stop and p.day <= (stop at time zone 'UTC')::date
      and p.at >= greatest(
          date_trunc('hour', stop, 'UTC'), date_trunc('hour', start + interval '3599.999999 seconds', 'UTC')
      )
      and p.day >= (date_trunc('hour', stop, 'UTC') at time zone 'UTC')::date
$$;

-- Pairs stored whole, a bounded number for each finding.
create table abreast.example (
    day date not null,
    pair_id text not null,
    captures bytea not null, -- zstd of the captures, each after its length (4 bytes, big-endian)
    differences jsonb not null, -- [{part, path, exact_path, kind, impact, old, new}]
    primary key (day, pair_id)
);

create table abreast.finding_example (
    finding_id bigint not null references abreast.finding on delete cascade,
    day date not null,
    pair_id text not null,
    body_bytes integer not null, -- bytes of both response bodies
    primary key (finding_id, day, pair_id),
    foreign key (day, pair_id) references abreast.example on delete cascade
);

create index finding_example_pair on abreast.finding_example (day, pair_id);

-- Stream entries that the worker could not process.
create table abreast.dead_letter (
    id bigint generated always as identity primary key,
    at timestamptz not null,
    service text not null,
    entry text not null, -- id in Redis's stream
    reason text not null,
    content bytea not null,
    unique (service, entry)
);

-- Rules

-- Rules are immutable: a change ends one and begins another. The version columns count changes and need no clock.
create table abreast.rule (
    id integer generated always as identity primary key,
    source text not null default '', -- the imported file
    name text not null,
    definition jsonb not null, -- the fields of a rule in a file, without name, owner, reason and expires
    owner text not null,
    reason text not null,
    expires timestamptz not null, -- exclusive
    created_at timestamptz not null default clock_timestamp(),
    created_by text not null,
    begin_version bigint not null,
    end_version bigint, -- null: in force
    ended_at timestamptz,
    ended_by text -- `abreast` for an expired rule
);

create unique index rule_name on abreast.rule (source, name) where end_version is null;

-- Each change of the rules increments `version`. `queued_version` is the version for which reapply_queue was last filled,
-- and `applied_version` the version that all stored pairs reflect.
create table abreast.rule_state (
    singleton boolean primary key default true check (singleton),
    version bigint not null default 0,
    queued_version bigint not null default 0,
    applied_version bigint not null default 0
);

insert into abreast.rule_state default values;

-- Stored pairs that a change of the rules may concern, until the rules are reapplied to them.
create table abreast.reapply_queue (
    day date not null,
    pair_id text not null,
    primary key (day, pair_id)
);

-- Return the version of the rules and hold it until the transaction ends, so that a batch commits under its own rules.
create function abreast.hold_rules_version() returns bigint language plpgsql as $$
begin
    perform pg_advisory_xact_lock_shared(hashtext('abreast.rules'));
    return (select version from abreast.rule_state);
end $$;

-- Wait for those who hold the rules, increment the version, and notify all sidecars at the commit.
create function abreast.next_rules_version() returns bigint language plpgsql as $$
declare
    changed bigint;
begin
    perform pg_advisory_xact_lock(hashtext('abreast.rules'));
    update abreast.rule_state set version = version + 1 returning version into changed;
    perform pg_notify('abreast_rules', changed::text);
    return changed;
end $$;

-- Replace ids by those they map to.
create function abreast.map_ids(ids bigint[], mapping jsonb) returns bigint[] language sql immutable as $$
    select case when cardinality(ids) > 0
        then array(select coalesce((mapping->>id::text)::bigint, id) from unnest(ids) with ordinality u (id, n) order by n)
        else ids end
$$;

-- Merge endpoints into others: pairs, findings and counters. The finding with the least id stays, and the others at the same
-- place merge into it. Their bets end, because a client may have made the same bet at several endpoints. `kept_marks`: all
-- marks but the bets. The caller holds the version of the rules exclusively, so no worker writes meanwhile.
create function abreast.merge_endpoints(origins integer[], targets integer[], kept_marks integer, max_examples integer)
returns void language plpgsql as $$
declare
    severities constant text[] := array['additive', 'value', 'breaking'];
    statuses constant text[] := array['expected', 'fixed', 'open', 'reopened', 'confirmed'];
    mapping jsonb;
    counters json;
begin
    create temporary table merged_endpoint on commit drop as
    select origin, target from unnest(origins, targets) as m (origin, target);

    create temporary table merged_finding on commit drop as
    select f.id, coalesce(m.target, f.endpoint_id) as endpoint_id, f.part, f.path, f.kind,
           first_value(f.id) over (
               partition by coalesce(m.target, f.endpoint_id), f.part, f.path, f.kind
               order by m.origin is not null, f.id
           ) as target
    from abreast.finding f left join merged_endpoint m on m.origin = f.endpoint_id
    where f.endpoint_id = any(origins || targets);

    select coalesce(jsonb_object_agg(id, target), '{}') into mapping from merged_finding where id <> target;

    update abreast.pair p
    set endpoint_id = m.target,
        findings = abreast.map_ids(findings, mapping),
        explained = abreast.map_ids(explained, mapping),
        baseline_findings = abreast.map_ids(baseline_findings, mapping),
        baseline_explained = abreast.map_ids(baseline_explained, mapping),
        drift = abreast.map_ids(drift, mapping),
        marks = (
            select jsonb_object_agg(
                coalesce(mapping->>key, key), case when mapping ? key then value::integer & kept_marks else value::integer end
            )
            from jsonb_each_text(marks)
        )
    from merged_endpoint m
    where p.endpoint_id = m.origin;

    perform from abreast.finding where id in (select id from merged_finding) order by id for no key update;

    with deleted as (
        delete from abreast.finding_release r using merged_finding f where r.finding_id = f.id and f.id <> f.target
        returning f.target, r.*
    )
    select coalesce(json_agg(to_jsonb(deleted) || jsonb_build_object(
        'finding_id', target, 'copy_greater_of_new', 0, 'copy_smaller_of_new', 0, 'other_above', 0, 'other_below', 0,
        'same_above', 0, 'same_below', 0, 'same_rises', 0, 'same_falls', 0, 'other_only', 0, 'same_only', 0,
        'copy_greater_of_old', 0, 'copy_smaller_of_old', 0
    )), '[]') into counters from deleted;
    perform abreast.add_finding_counts(counters);

    -- The greatest severity and the most cautious status count. A detector's finding takes no sum.
    with other as (
        select m.target, sum(f.count) as count, max(f.count) as greatest, sum(f.baseline_count) as baseline_count,
               sum(f.shape_explained) as shape_explained, sum(f.repeat_checks) as repeat_checks,
               sum(f.old_repeats) as old_repeats, sum(f.new_repeats) as new_repeats, sum(f.drift_count) as drift_count,
               max(array_position(severities, f.impact)) as severity, max(array_position(statuses, f.status)) as status,
               max(f.fixed_after) as fixed_after, min(f.first_seen) as first_seen, max(f.last_seen) as last_seen
        from merged_finding m join abreast.finding f on f.id = m.id
        where m.id <> m.target
        group by m.target
    ),
    event as (
        insert into abreast.finding_event (finding_id, actor, before, after, reason)
        select t.id, 'abreast', t.status, statuses[o.status], 'merged with the findings of other paths'
        from other o join abreast.finding t on t.id = o.target
        where o.status > array_position(statuses, t.status)
    )
    update abreast.finding t
    set count = case when abreast.is_aggregate(t) then greatest(t.count, o.greatest) else t.count + o.count end,
        baseline_count = t.baseline_count + o.baseline_count,
        shape_explained = t.shape_explained + o.shape_explained,
        repeat_checks = t.repeat_checks + o.repeat_checks,
        old_repeats = t.old_repeats + o.old_repeats,
        new_repeats = t.new_repeats + o.new_repeats,
        drift_count = t.drift_count + o.drift_count,
        impact = severities[greatest(o.severity, array_position(severities, t.impact))],
        status = statuses[greatest(o.status, array_position(statuses, t.status))],
        fixed_after = greatest(t.fixed_after, o.fixed_after),
        first_seen = least(t.first_seen, o.first_seen),
        last_seen = greatest(t.last_seen, o.last_seen)
    from other o
    where t.id = o.target;

    update abreast.finding_event e
    set finding_id = m.target
    from merged_finding m
    where e.finding_id = m.id and m.id <> m.target;

    -- Keep the smallest examples.
    update abreast.finding_example x set finding_id = m.target
    from merged_finding m where x.finding_id = m.id and m.id <> m.target;
    create temporary table surplus_example on commit drop as
    select finding_id, day, pair_id
    from (
        select finding_id, day, pair_id,
               row_number() over (partition by finding_id order by body_bytes, day desc, pair_id) as number
        from abreast.finding_example
        where finding_id in (select target from merged_finding)
    ) as ranked
    where number > max_examples;
    delete from abreast.finding_example x
    using surplus_example s where (x.finding_id, x.day, x.pair_id) = (s.finding_id, s.day, s.pair_id);
    delete from abreast.example x
    using surplus_example s
    where (x.day, x.pair_id) = (s.day, s.pair_id)
      and not exists (select from abreast.finding_example e where (e.day, e.pair_id) = (x.day, x.pair_id));

    delete from abreast.finding f using merged_finding m where f.id = m.id and m.id <> m.target;
    update abreast.finding f set endpoint_id = m.endpoint_id from merged_finding m where f.id = m.id;

    perform from abreast.endpoint where id = any(origins || targets) order by id for no key update;

    with deleted as (
        delete from abreast.endpoint_release r using merged_endpoint m where r.endpoint_id = m.origin
        returning m.target, r.old_release, r.new_release, r.compared, r.baseline_compared
    )
    insert into abreast.endpoint_release as stored (endpoint_id, old_release, new_release, compared, baseline_compared)
    select target, old_release, new_release, sum(compared), sum(baseline_compared)
    from deleted
    group by target, old_release, new_release
    on conflict (endpoint_id, old_release, new_release) do update
    set compared = stored.compared + excluded.compared,
        baseline_compared = stored.baseline_compared + excluded.baseline_compared;

    -- -1: the noise job classifies the findings again.
    update abreast.endpoint t
    set compared = t.compared + o.compared, baseline_compared = t.baseline_compared + o.baseline_compared,
        classified_compared = -1
    from (
        select m.target, sum(e.compared) as compared, sum(e.baseline_compared) as baseline_compared
        from merged_endpoint m join abreast.endpoint e on e.id = m.origin
        group by m.target
    ) as o
    where t.id = o.target;

    delete from abreast.request_sample where endpoint_id = any(origins);
    delete from abreast.hourly_count where endpoint_id = any(origins) and pairs = 0;
    delete from abreast.endpoint where id = any(origins);
    drop table merged_endpoint, merged_finding, surplus_example;
end $$;

-- Reports

-- The last report of each service process. Counters are cumulative, so a repeated report changes nothing.
create table abreast.process_report (
    id text primary key,
    service text not null,
    seen timestamptz not null,
    report jsonb not null
);

-- The last report of each Redis shard. Cumulative over restarts of Redis: received, duplicate, late, rejected_pairs,
-- rejected_bytes, joined, timed_out. Current: waiting, ready, bytes. Bookkeeping of the sums: life, base, last.
create table abreast.shard_report (
    service text not null,
    shard integer not null,
    seen timestamptz not null,
    report jsonb not null,
    primary key (service, shard)
);

-- Counters of each Envoy node (its id and admin address), cumulative over restarts.
create table abreast.envoy_report (
    node text not null,
    service text not null,
    seen timestamptz not null, -- by Postgres's clock
    sidecar_seen timestamptz, -- by the sidecar's clock
    -- {sampled: requests; old_shadow, new_shadow, old_baseline, new_baseline: intended copies; not_sent: copies that never
    -- left Envoy; shadows_sent, shadows_ejected: copies to the other version, and those of them without a connection; new_sent,
    -- new_ejected, new_answered: copies to new. Dropped to protect a version: shed_queue: copies; shed_baseline: baseline
    -- copies; shed_failing, shed_queueing: requests that were not sampled. Neither sampled: logged_in, over_memory. Part
    -- of not_sent: too_large. Captures that Envoy made: captures_sent, captures_over_memory, captures_undelivered. By
    -- their rate, requests that former processes may have sampled after their last reading: unseen. For each rule, its
    -- sampled requests, and those without a copy: rule.NAME.sampled, rule.NAME.not_query}
    totals jsonb not null,
    -- The same since the start of the running process. in_flight: present copies to new; overrides: 1 if the admin
    -- interface sets runtime values.
    last_reading jsonb not null,
    primary key (node, service)
);

-- Sampled requests of each worker thread of an Envoy process. A pair id has the number of the request, so requests that
-- Envoy counted and no reading saw are known from later captures.
create table abreast.envoy_stream (
    service text not null,
    stream text not null, -- from the pair ids
    node text not null default '', -- in envoy_report; empty until a reading of an Envoy names or adopts the stream
    counted bigint not null default 0, -- by the last reading of the Envoy
    highest bigint not null default 0, -- number in the ledger
    seen timestamptz not null,
    primary key (service, stream)
) with (fillfactor = 70);

-- Sampled requests of a service in steps of ten seconds. Retention folds dropped days into one row at -infinity.
create table abreast.envoy_count (
    service text not null,
    at timestamptz not null, -- start of the step
    sampled bigint not null,
    without_copy bigint not null default 0, -- sampled requests whose copy was not sent; negative once copies in flight are
    shed bigint not null default 0, -- part of `without_copy`: copies that would have queued
    not_sampled bigint not null default 0, -- requests that the shares select, but that the script does not sample
    not_query bigint not null default 0, -- part of `without_copy`: requests that are not the GraphQL queries of their rule
    unanswered bigint not null default 0, -- copies to new without an answer; negative once those in flight are answered
    primary key (service, at)
) with (fillfactor = 70);

-- Estimate the requests that Envoys sampled in a window. A step counts in proportion to its overlap. Requests without a
-- known time may belong to any window.
create function abreast.envoy_sampled(for_service text, start timestamptz, stop timestamptz) returns bigint
language sql stable as $$
    with stored as (
        select sum((totals->>'sampled')::bigint)::bigint as total from abreast.envoy_report where service = for_service
    ),
    placed as (
        select coalesce(sum(sampled), 0) as total from abreast.envoy_count where service = for_service
    ),
    inside as (
        select coalesce(sum(sampled * case
                   when span.until <= at then 1
                   else extract(epoch from least(span.until, stop) - greatest(at, start))
                      / extract(epoch from span.until - at) end), 0) as total
        from abreast.envoy_count
        cross join lateral (select least(at + interval '10 seconds', clock_timestamp()) as until) as span
        where service = for_service and isfinite(at)
          and at > coalesce(start, '-infinity') - interval '10 seconds' and at < coalesce(stop, 'infinity')
          and span.until > coalesce(start, '-infinity')
    )
    select case when start is null and stop is null then stored.total
                else round(inside.total)::bigint + greatest(stored.total - placed.total, 0)::bigint end
    from stored, placed, inside
$$;

-- Bound the pairs that a window may have beyond Envoy's count without any fault. They are 10 pairs, the requests sampled in the
-- 15 seconds before its start, which may be joined after it, and the requests of two seconds: counters are read once per
-- second. Counts are in steps of ten seconds.
create function abreast.surplus_tolerance(for_service text, start timestamptz) returns bigint
language sql stable as $$
    select 10 + coalesce(sum(sampled) filter (where at > start - interval '25 seconds' and at <= start), 0)::bigint
           + ceil(coalesce(max(sampled) filter (where at > clock_timestamp() - interval '1 minute'), 0) * 0.2)::bigint
    from abreast.envoy_count
    where service = for_service
      and at > least(start - interval '25 seconds', clock_timestamp() - interval '1 minute')
$$;

-- Fold the reports of stopped processes and Envoys into one row for each service. The caller passes the cutoff,
-- because no single clock is trusted.
create function abreast.fold_reports(oldest timestamptz) returns void language plpgsql as $$
begin
    with deleted as (
        delete from abreast.process_report where seen < oldest and id <> '(former) ' || service
        returning service, seen, report
    ),
    reported as (
        select service, seen, report from deleted
        union all
        select service, seen, report from abreast.process_report where id = '(former) ' || service
    ),
    summed as (
        select service, name, d.key, sum(d.value::bigint) as total
        from reported
        cross join unnest(array['dropped', 'unconverted']) as name
        cross join lateral jsonb_each_text(
            case jsonb_typeof(report->name) when 'object' then report->name else '{}' end
        ) as d
        where d.value ~ '^[0-9]{1,15}$'
        group by service, name, d.key
    ),
    counts as (
        select service, name, jsonb_object_agg(key, total) as counts from summed group by service, name
    )
    insert into abreast.process_report as stored (id, service, seen, report)
    select '(former) ' || service, service, max(seen),
           jsonb_build_object(
               'dropped', coalesce(
                   (select c.counts from counts c where c.service = reported.service and c.name = 'dropped'), '{}'
               ),
               'unconverted', coalesce(
                   (select c.counts from counts c where c.service = reported.service and c.name = 'unconverted'), '{}'
               ),
               'late_effects', coalesce(
                   sum((report->>'late_effects')::bigint) filter (where report->>'late_effects' ~ '^[0-9]{1,15}$'), 0
               )
           )
    from reported
    where service in (select service from deleted)
    group by service
    on conflict (id) do update set seen = excluded.seen, report = excluded.report;

    with deleted as (
        delete from abreast.envoy_report where seen < oldest and node <> '(former)' returning service, seen, totals
    ),
    reported as (
        select service, seen, totals from deleted
        union all
        select service, seen, totals from abreast.envoy_report where node = '(former)'
    )
    insert into abreast.envoy_report as stored (node, service, seen, totals, last_reading)
    select '(former)', service, max(seen),
           (
               select jsonb_object_agg(key, total)
               from (
                   select c.key, sum(c.value::bigint) as total
                   from reported part cross join lateral jsonb_each_text(part.totals) as c
                   where part.service = reported.service
                   group by c.key
               ) as summed
           ),
           '{}'
    from reported
    where service in (select service from deleted)
    group by service
    on conflict (node, service) do update set seen = excluded.seen, totals = excluded.totals;

    delete from abreast.envoy_stream where seen < oldest and node = '';
    with deleted as (
        delete from abreast.envoy_stream s
        where seen < oldest
          and (
              stream <> '(former) ' || node
              or not exists (select from abreast.envoy_report r where (r.node, r.service) = (s.node, s.service))
          )
        returning service, node, counted, greatest(counted, highest) as highest, seen
    ),
    moved as (
        select coalesce(r.node, '(former)') as node, d.service, d.counted, d.highest, d.seen
        from deleted d left join abreast.envoy_report r on (r.node, r.service) = (d.node, d.service)
    )
    insert into abreast.envoy_stream as stored (service, stream, node, counted, highest, seen)
    select service, '(former) ' || node, node, sum(counted), sum(highest), max(seen) from moved group by service, node
    on conflict (service, stream) do update
    set counted = stored.counted + excluded.counted, highest = greatest(stored.counted, stored.highest) + excluded.highest;
end $$;

-- Fold the counters of releases without stored pairs into one row, without release, of each endpoint and finding.
create function abreast.fold_releases() returns void language plpgsql as $$
declare
    folded json;
begin
    create temporary table former on commit drop as
    with kept as materialized (
        select distinct endpoint_id, old_release, new_release from abreast.hourly_count where pairs > 0
    ),
    stored as (
        select endpoint_id, old_release, new_release from abreast.endpoint_release
        union
        select f.endpoint_id, r.old_release, r.new_release
        from abreast.finding_release r join abreast.finding f on f.id = r.finding_id
    )
    select stored.*
    from stored
    left join abreast.release o on o.id = stored.old_release
    left join abreast.release n on n.id = stored.new_release
    where (stored.old_release, stored.new_release) <> (0, 0)
      and coalesce(o.label, '') <> '(other)' and coalesce(n.label, '') <> '(other)'
      and not exists (
          select from kept
          where kept.endpoint_id = stored.endpoint_id
            and (stored.old_release = 0 or kept.old_release = o.label)
            and (stored.new_release = 0 or kept.new_release = n.label)
      );

    -- The lock order of all writers.
    perform from abreast.finding where endpoint_id in (select endpoint_id from former) order by id for no key update;

    with deleted as (
        delete from abreast.finding_release r
        using abreast.finding f, former
        where f.id = r.finding_id
          and (former.endpoint_id, former.old_release, former.new_release) = (f.endpoint_id, r.old_release, r.new_release)
        returning r.*
    )
    select json_agg(to_jsonb(deleted) || '{"old_release": 0, "new_release": 0}') into folded from deleted;
    perform abreast.add_finding_counts(folded);

    perform from abreast.endpoint where id in (select endpoint_id from former) order by id for no key update;

    with deleted as (
        delete from abreast.endpoint_release r
        using former
        where (former.endpoint_id, former.old_release, former.new_release) = (r.endpoint_id, r.old_release, r.new_release)
        returning r.*
    )
    insert into abreast.endpoint_release as stored (endpoint_id, old_release, new_release, compared, baseline_compared)
    select endpoint_id, 0, 0, sum(compared), sum(baseline_compared)
    from deleted
    group by endpoint_id
    on conflict (endpoint_id, old_release, new_release) do update
    set compared = stored.compared + excluded.compared,
        baseline_compared = stored.baseline_compared + excluded.baseline_compared;
    drop table former;
end $$;

-- Drop a day's partition and fold its totals. Wait at most a second for readers, because all others would wait behind it.
create function abreast.drop_day(target date) returns void language plpgsql
    security definer set search_path = pg_catalog, pg_temp
as $$
declare
    following timestamptz := (target + 1)::timestamp at time zone 'UTC';
begin
    perform set_config('lock_timeout', '1s', true);
    execute format('drop table if exists abreast.%I', 'pair_' || to_char(target, 'YYYYMMDD'));
    update abreast.retention_state set dropped_until = greatest(dropped_until, target);
    delete from abreast.example where day <= target;
    delete from abreast.hourly_count where hour < following;
    with deleted as (
        delete from abreast.envoy_count where isfinite(at) and at < following returning service, sampled, shed, not_query
    )
    insert into abreast.envoy_count as stored (service, at, sampled, shed, not_query)
    select service, '-infinity', sum(sampled), sum(shed), sum(not_query) from deleted group by service
    on conflict (service, at) do update
    set sampled = stored.sampled + excluded.sampled, shed = stored.shed + excluded.shed,
        not_query = stored.not_query + excluded.not_query;
    with deleted as (
        delete from abreast.outcome_count where day <= target and isfinite(day) returning service, outcome, pairs
    )
    insert into abreast.outcome_count as stored (service, day, outcome, pairs)
    select service, '-infinity', outcome, sum(pairs) from deleted group by service, outcome
    on conflict (service, day, outcome) do update set pairs = stored.pairs + excluded.pairs;
end $$;

revoke execute on function abreast.open_day, abreast.drop_day from public;

-- Functions for the worker's commits. Sessions keep the plans of their statements, which take longer to plan than to run.

-- Insert pairs, except those of dropped days, and return the new ones. A pair that gets a second entry after midnight has
-- another key, so the day before is checked. The fixed order prevents deadlocks between workers.
create function abreast.add_pairs(rows json) returns table (id text, day integer) language plpgsql as $$
#variable_conflict use_column
begin
    return query
    insert into abreast.pair (
        day, id, at, endpoint_id, outcome, live, request, old_status, new_status, old_us, new_us, old_release, new_release,
        findings, baseline_differs, baseline_findings, reason, explained, explained_by, baseline_explained,
        baseline_explained_by, rules_version,
        old_hits, old_misses, new_hits, new_misses, failed_over, baseline_us, marks, waits_match, baseline_waits_match,
        old_in_flight, new_in_flight, left_by
    )
    select (at at time zone 'UTC')::date, id, at, endpoint_id, outcome, live, coalesce(request, ''), old_status, new_status,
           old_us, new_us, coalesce(old_release, ''), coalesce(new_release, ''), coalesce(findings, '{}'), baseline_differs,
           coalesce(baseline_findings, '{}'), coalesce(reason, ''), explained, explained_by, baseline_explained,
           baseline_explained_by, rules_version,
           old_hits, old_misses, new_hits, new_misses, coalesce(failed_over, false), baseline_us, marks, waits_match,
           baseline_waits_match, old_in_flight, new_in_flight, left_by
    from json_to_recordset(rows) as input (
        id text, ms bigint, endpoint_id integer, outcome text, live text, request text, old_status smallint,
        new_status smallint, old_us integer, new_us integer, old_release text, new_release text, findings bigint[],
        baseline_differs boolean, baseline_findings bigint[], reason text, explained bigint[], explained_by integer[],
        baseline_explained bigint[], baseline_explained_by integer[], rules_version bigint, old_hits integer,
        old_misses integer, new_hits integer, new_misses integer, failed_over boolean, baseline_us integer,
        marks jsonb, waits_match boolean, baseline_waits_match boolean, old_in_flight smallint, new_in_flight smallint,
        left_by bigint
    ), lateral (select timestamptz 'epoch' + ms * interval '1 ms') as moment (at)
    where (at at time zone 'UTC')::date > (select dropped_until from abreast.retention_state)
      and not (
          at < date_trunc('day', at, 'UTC') + interval '1 hour'
          and exists (select from abreast.pair p where p.id = input.id and p.day = (moment.at at time zone 'UTC')::date - 1)
      )
    order by id, ms
    on conflict do nothing
    returning id, (at at time zone 'UTC')::date - date '1970-01-01';
end $$;

-- Add to the counters of findings, by rule and release, and to their totals. No other statement changes them. A fixed
-- finding reopens if a later release shows it; without labels, if a later pair shows it. The row is locked, so it reopens
-- once.
create function abreast.count_findings(rows json) returns void language plpgsql as $$
begin
    perform from abreast.finding
    where id in (select (value ->> 'finding_id')::bigint from json_array_elements(rows)) order by id for no key update;
    perform abreast.add_finding_counts(rows);
    with input as (
        select input.*, array_position(array['additive', 'value', 'breaking'], impact) as severity
        from json_to_recordset(rows) as input (
            rule_id integer, finding_id bigint, new_release integer, count bigint, baseline_count bigint,
            shape_explained bigint, copy_greater_of_new bigint, copy_smaller_of_new bigint, repeat_checks bigint,
            old_repeats bigint, new_repeats bigint, other_above bigint, other_below bigint, same_above bigint,
            same_below bigint, same_rises bigint, same_falls bigint, other_only bigint, same_only bigint, copy_greater_of_old bigint,
            copy_smaller_of_old bigint, drift_count bigint, impact text, first_seen timestamptz, last_seen timestamptz
        )
        where rule_id = 0
    ),
    total as (
        select finding_id as id, sum(count) as count, sum(baseline_count) as baseline_count,
               sum(shape_explained) as shape_explained, sum(copy_greater_of_new) as copy_greater_of_new,
               sum(copy_smaller_of_new) as copy_smaller_of_new,
               sum(repeat_checks) as repeat_checks, sum(old_repeats) as old_repeats, sum(new_repeats) as new_repeats,
               sum(other_above) as other_above, sum(other_below) as other_below,
               sum(same_above) as same_above,
               sum(same_below) as same_below, sum(same_rises) as same_rises, sum(same_falls) as same_falls, sum(other_only) as other_only,
               sum(same_only) as same_only, sum(copy_greater_of_old) as copy_greater_of_old,
               sum(copy_smaller_of_old) as copy_smaller_of_old, sum(drift_count) as drift_count,
               max(severity) as severity, min(first_seen) as first, max(last_seen) as last
        from input
        group by finding_id
    ),
    reopened as (
        select distinct on (f.id) f.id, r.label
        from input g
        join abreast.finding f on f.id = g.finding_id
        join abreast.release r on r.id = g.new_release
        where f.status = 'fixed' and g.count > 0
          and (r.id > f.fixed_after or (r.label = '' and g.last_seen > f.status_since))
        order by f.id, r.id desc
    ),
    event as (
        insert into abreast.finding_event (finding_id, actor, before, after, release, reason)
        select id, 'abreast', 'fixed', 'reopened', label, 'seen again'
        from reopened
    )
    update abreast.finding
    set count = finding.count + total.count, baseline_count = finding.baseline_count + total.baseline_count,
        shape_explained = finding.shape_explained + total.shape_explained,
        copy_greater_of_new = finding.copy_greater_of_new + total.copy_greater_of_new,
        copy_smaller_of_new = finding.copy_smaller_of_new + total.copy_smaller_of_new,
        repeat_checks = finding.repeat_checks + total.repeat_checks, old_repeats = finding.old_repeats + total.old_repeats,
        new_repeats = finding.new_repeats + total.new_repeats, other_above = finding.other_above + total.other_above,
        other_below = finding.other_below + total.other_below,
        same_above = finding.same_above + total.same_above,
        same_below = finding.same_below + total.same_below,
        same_rises = finding.same_rises + total.same_rises,
        same_falls = finding.same_falls + total.same_falls,
        other_only = finding.other_only + total.other_only, same_only = finding.same_only + total.same_only,
        copy_greater_of_old = finding.copy_greater_of_old + total.copy_greater_of_old,
        copy_smaller_of_old = finding.copy_smaller_of_old + total.copy_smaller_of_old,
        drift_count = finding.drift_count + total.drift_count,
        first_seen = case when finding.count = 0 and total.count > 0 then total.first
                          else least(finding.first_seen, total.first) end,
        last_seen = greatest(finding.last_seen, total.last),
        impact = case when total.severity > array_position(array['additive', 'value', 'breaking'], finding.impact)
                      then (array['additive', 'value', 'breaking'])[total.severity] else finding.impact end,
        status = case when reopened.id is null then finding.status else 'reopened' end,
        status_since = case when reopened.id is null then finding.status_since else clock_timestamp() end
    from total left join reopened using (id)
    where finding.id = total.id;
end $$;

-- Add to the counters of outcomes, streams and endpoints, and store request samples, each null for none. Locks are in the
-- order of all writers, and by key.
create function abreast.count_pairs(outcomes json, streams json, endpoints json, samples json) returns void
language plpgsql as $$
begin
    if outcomes is not null then
        insert into abreast.outcome_count (service, day, outcome, pairs)
        select service, date '1970-01-01' + day, outcome, pairs
        from json_to_recordset(outcomes) as input (service text, day integer, outcome text, pairs bigint)
        order by service, day, outcome
        on conflict (service, day, outcome) do update set pairs = outcome_count.pairs + excluded.pairs;
    end if;

    if streams is not null then -- the numbers that the ledger knows
        insert into abreast.envoy_stream as stored (service, stream, highest, seen)
        select service, stream, highest, clock_timestamp()
        from json_to_recordset(streams) as input (service text, stream text, highest bigint)
        order by service, stream
        on conflict (service, stream) do update
        set highest = greatest(stored.highest, excluded.highest), seen = excluded.seen;
    end if;

    if endpoints is not null then
        perform from abreast.endpoint
        where id in (select (value ->> 'id')::integer from json_array_elements(endpoints)) order by id for no key update;
        with input as (
            select id, old_release, new_release, compared, baseline_compared
            from json_to_recordset(endpoints) as input (
                id integer, old_release integer, new_release integer, compared bigint, baseline_compared bigint
            )
        ),
        by_release as (
            insert into abreast.endpoint_release as stored (endpoint_id, old_release, new_release, compared, baseline_compared)
            select id, old_release, new_release, compared, baseline_compared
            from input
            order by id, old_release, new_release
            on conflict (endpoint_id, old_release, new_release) do update
            set compared = stored.compared + excluded.compared,
                baseline_compared = stored.baseline_compared + excluded.baseline_compared
        )
        update abreast.endpoint
        set compared = endpoint.compared + total.compared,
            baseline_compared = endpoint.baseline_compared + total.baseline_compared
        from (
            select id, sum(compared) as compared, sum(baseline_compared) as baseline_compared from input group by id
        ) as total
        where endpoint.id = total.id;
    end if;

    if samples is not null then
        insert into abreast.request_sample (endpoint_id, finding_id, slot, at, findings, features, client)
        select endpoint_id, finding_id, slot, timestamptz 'epoch' + ms * interval '1 ms', findings, features, client
        from json_to_recordset(samples) as input (
            endpoint_id integer, finding_id bigint, slot smallint, ms bigint, findings bigint[], features jsonb,
            client bigint
        )
        order by endpoint_id, finding_id, slot
        on conflict (endpoint_id, finding_id, slot)
        do update
        set at = excluded.at, findings = excluded.findings, features = excluded.features, client = excluded.client;
    end if;
end $$;

-- Traffic

-- Traffic settings of a service.
create table abreast.traffic (
    service text primary key,
    version bigint not null default 1, -- grows with every change
    new_share integer not null, -- hundredths of a percent, 0 to 10000
    sample_safe integer not null, -- millionths, 0 to 1000000
    sample_unsafe integer not null,
    baseline_share integer not null, -- millionths of the sampled safe requests
    rolled_back boolean not null default false,
    conflict text not null default '', -- why the users' share must be confirmed; empty if it need not
    drill_share integer not null default 0, -- part of new_share whose requests get a fault
    drill_delay_ms integer not null default 0, -- 0: the fault is an error
    drill_s integer not null default 0, -- seconds after updated_at
    drill_by_header boolean not null default false, -- only requests with the header abreast-drill get the fault
    rule_shares jsonb not null default '{}', -- {name of a sampling rule: millionths}; others have the share of Envoy's file
    revision text not null default gen_random_uuid()::text, -- identifies these settings, unique across databases
    updated_at timestamptz not null default now(),
    check (new_share between 0 and 10000),
    check (sample_safe between 0 and 1000000),
    check (sample_unsafe between 0 and 1000000),
    check (baseline_share between 0 and 1000000)
);

-- Expect baseline copies at an endpoint while it has few pairs and some copies have come. Until there are enough, its
-- times prove nothing. `between` keeps the planner on pair_endpoint_at; with `=` it may scan the pairs of all endpoints.
-- It returns a table, so that Postgres plans it as a part of a query. A call for each endpoint would take longer than the
-- rest of a verdict.
create function abreast.expects_baseline(endpoint_id integer, service text, pairs bigint)
returns table (expects_baseline boolean) language sql stable parallel safe as $$
    select pairs < 1000
        and exists (select from abreast.traffic t where t.service = expects_baseline.service and t.baseline_share > 0)
        and (
            select coalesce(bool_or(newest.copied), false)
            from (
                select p.baseline_us is not null as copied
                from abreast.pair p
                where p.endpoint_id between expects_baseline.endpoint_id and expects_baseline.endpoint_id
                order by p.endpoint_id desc, p.at desc
                limit 1000
            ) as newest
        )
$$;

-- Audit log of traffic, guard and ramp.
create table abreast.traffic_event (
    id bigint generated always as identity primary key,
    uid uuid not null default gen_random_uuid(), -- id for webhook receivers, unique across databases
    service text not null,
    at timestamptz not null default now(),
    actor text not null,
    action text not null, -- create, update, rollback, promote, guard_*, ramp_*, drill_*
    reason text not null,
    before jsonb,
    after jsonb not null,
    detail jsonb not null default '{}' -- {guard_before, guard_after, ramp_before, ramp_after, passed}, where they apply
);

create index traffic_event_service on abreast.traffic_event (service, id desc);

-- Return the times of drills. Requests without a response of new in them show the fault, not the version.
create function abreast.drill_spans(for_service text) returns table (start timestamptz, stop timestamptz)
language sql stable as $$
    select at, least(at + (after->>'drill_s')::integer * interval '1 second', following) + interval '5 seconds'
    from (
        select at, action, after, lead(at) over (order by id) as following
        from abreast.traffic_event where service = for_service
    ) as event
    where action = 'drill_start'
$$;

-- Check that the ledger's history contains settings of the service, as settings or merged into others. A ledger that
-- was restored from an older copy lacks those of its lost changes.
create function abreast.includes_revision(t abreast.traffic, known text) returns boolean stable language sql return
    known is null or known = t.revision
    or exists (
        select from abreast.traffic_event e
        where e.service = t.service and known in (e.after ->> 'revision', e.after ->> 'merged')
    );

-- Key that signs rollbacks in Redis, unless ABREAST_CONTROL_KEY is set. Services can't read it.
create table abreast.control_key (
    key bytea not null
);

insert into abreast.control_key
select sha256(convert_to(gen_random_uuid()::text || gen_random_uuid()::text, 'UTF8'));

-- Automatic rollback of a service.
create table abreast.guard (
    service text primary key,
    -- {mode: off, watching or acting; confidence, min_completeness; errors, mismatches, slower: {limit, min_pairs, window,
    -- cooldown}}; times in seconds
    policy jsonb not null,
    since timestamptz not null default clock_timestamp(), -- time of the policy; earlier evidence does not count
    fired_at jsonb not null default '{}', -- {rule: time of its last rollback, or of one it would have made}
    state text not null default 'waiting', -- idle, clear, breached, blind; waiting: not checked yet
    message text not null default '', -- reason for `state`
    checked_at timestamptz
);

-- Automatic increase of new's share in steps. At most one ramp of a service is active.
create table abreast.ramp (
    id bigint generated always as identity primary key,
    service text not null,
    state text not null, -- progressing, paused; ended: succeeded, failed, aborted, superseded
    steps integer[] not null, -- shares of new, in hundredths of a percent
    step integer not null default 0, -- index of the current share in `steps`
    step_seconds float8 not null, -- least duration of a step, in seconds
    min_pairs integer not null, -- compared pairs that a step needs
    budget jsonb not null, -- {max_mismatch, max_error, max_slower, min_completeness, confidence, max_blind}
    actor text not null,
    reason text not null,
    started_at timestamptz not null,
    step_at timestamptz not null, -- start of the step, or of the resumed ramp
    ended_at timestamptz,
    version bigint not null, -- traffic version of the step
    started_gap bigint, -- requests sampled by Envoy and not in the ledger at the start; null: unknown
    step_gap bigint, -- the same at the start of the step
    verdict text not null default '', -- PASS, FAIL or INCONCLUSIVE, of the last check
    message text not null default '', -- the condition that the ramp waits for, or its end
    checked_at timestamptz,
    check (state in ('progressing', 'paused', 'succeeded', 'failed', 'aborted', 'superseded')),
    check (step >= 0 and step < cardinality(steps))
);

create index ramp_service on abreast.ramp (service, id desc);
create unique index ramp_active on abreast.ramp (service) where state in ('progressing', 'paused');

-- Webhook receivers from the leader's settings, with delivery counters. A URL may contain a token, so only its host and
-- a hash are stored.
create table abreast.webhook_receiver (
    name text primary key,
    delivered bigint not null default 0,
    failed bigint not null default 0, -- attempts
    dropped bigint not null default 0 -- messages given up
);

-- Outbox: undelivered messages, one for each event and receiver, written in the event's transaction.
create table abreast.webhook_delivery (
    id bigint generated always as identity primary key,
    event_id bigint not null,
    receiver text not null references abreast.webhook_receiver on delete cascade,
    attempts integer not null default 0,
    due_at timestamptz not null default clock_timestamp(),
    unique (event_id, receiver)
);

create index webhook_delivery_receiver on abreast.webhook_delivery (receiver, due_at);

-- Write an event with its webhook messages, and notify all sidecars at the commit.
create function abreast.record_event(
    service text, at timestamptz, actor text, action text, reason text, before jsonb, after jsonb, detail jsonb
) returns void language sql as $$
    with written as (
        insert into abreast.traffic_event (service, at, actor, action, reason, before, after, detail)
        values ($1, $2, $3, $4, $5, $6, $7, $8)
        returning id
    )
    insert into abreast.webhook_delivery (event_id, receiver)
    select written.id, receiver.name from written cross join abreast.webhook_receiver receiver where $4 <> 'create';
    select pg_notify('abreast_traffic', $1)
$$;

-- Running sidecars and their connected Envoys. Unlogged: each sidecar writes its row every second.
create unlogged table abreast.sidecar (
    id uuid primary key, -- one per process
    address text not null, -- host and gRPC port
    seen timestamptz not null,
    envoys jsonb not null -- [{service, node, peer, number, acknowledged, answered, after, error}]
);

-- Check the age in both directions: after a clock was set back, a time far in the future is as stale as an old one.
create function abreast.is_alive(seen timestamptz, expires float8) returns boolean language sql as
    'select abs(extract(epoch from clock_timestamp() - seen)) <= expires';

-- Tokens of callers. A name is never used again, because the audit log refers to it.
create table abreast.token (
    id bigint generated always as identity primary key,
    name text not null unique,
    digest bytea not null unique, -- SHA-256 of the secret, which the ledger does not have
    scopes text[] not null, -- read, bodies, operate, admin, envoy
    services text[] not null default '{}', -- empty: all
    node text not null default '', -- node id of the only Envoy; empty: any
    creator text not null,
    created_at timestamptz not null default clock_timestamp(),
    expires_at timestamptz,
    revoked_at timestamptz
);

-- Wake all sidecars, which keep the tokens in memory.
create function abreast.notify_tokens() returns trigger language plpgsql as $$
begin
    perform pg_notify('abreast_tokens', '');
    return null;
end
$$;

create trigger token_changed after insert or update or delete on abreast.token
    for each statement execute function abreast.notify_tokens();

-- Changes and looks at bodies.
create table abreast.audit_event (
    id bigint generated always as identity primary key,
    at timestamptz not null default clock_timestamp(),
    actor text not null, -- name of the token; without tokens, the actor of the request or the caller's address
    peer text not null, -- address of the caller
    action text not null, -- TrafficService/Rollback
    service text not null, -- empty: the call names none
    target text not null -- an id or a name
);

create index audit_event_at on abreast.audit_event (at);
