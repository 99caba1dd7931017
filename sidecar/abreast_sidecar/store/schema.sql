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
    compared bigint not null default 0, -- compared pairs of old and new
    baseline_compared bigint not null default 0, -- compared pairs of old and old
    -- Both counters when the noise job last classified the findings; -1 makes it classify them again.
    classified_compared bigint not null default 0,
    classified_baseline bigint not null default 0,
    unique (service, method, route)
) with (fillfactor = 70); -- counters change often: free space on the page saves index updates

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
-- finding_release. Only the query findings_count changes both.
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
    new_greater bigint not null default 0, -- part of `count`, by the first value; absent and null are the least
    new_smaller bigint not null default 0,
    -- Consecutive pairs of one worker: how often it compared, and how often a version repeated a recent value.
    repeat_checks bigint not null default 0,
    old_repeats bigint not null default 0,
    new_repeats bigint not null default 0,
    -- Numbers of new above twice, or below half of old's; then the same for baseline copies.
    magnitude_up bigint not null default 0,
    magnitude_down bigint not null default 0,
    baseline_magnitude_up bigint not null default 0,
    baseline_magnitude_down bigint not null default 0,
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

-- Counters of findings by release ids, as in endpoint_release.
create table abreast.finding_release (
    finding_id bigint not null references abreast.finding on delete cascade,
    old_release integer not null,
    new_release integer not null,
    count bigint not null default 0,
    baseline_count bigint not null default 0,
    shape_explained bigint not null default 0,
    new_greater bigint not null default 0,
    new_smaller bigint not null default 0,
    repeat_checks bigint not null default 0,
    old_repeats bigint not null default 0,
    new_repeats bigint not null default 0,
    magnitude_up bigint not null default 0,
    magnitude_down bigint not null default 0,
    baseline_magnitude_up bigint not null default 0,
    baseline_magnitude_down bigint not null default 0,
    first_seen timestamptz not null,
    last_seen timestamptz not null,
    primary key (finding_id, old_release, new_release)
) with (fillfactor = 70);

-- Request features without bodies: names of parameters, headers and body fields with short values. Each endpoint keeps
-- a random sample, and each finding some requests that show it. Later requests reuse the slots.
create table abreast.request_sample (
    endpoint_id integer not null references abreast.endpoint,
    finding_id bigint not null, -- 0: any request of the endpoint
    slot smallint not null,
    at timestamptz not null,
    findings bigint[] not null,
    features jsonb not null, -- {name: [values]}
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
    failed_over boolean not null default false, -- new failed first, then old answered the user; `live` is old
    request text not null default '', -- path and query
    old_status smallint,
    new_status smallint,
    old_us integer, -- total time in µs
    new_us integer,
    baseline_us integer, -- time of old for the baseline copy, if old also answered the user
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
    -- 512 baseline_magnitude_down
    marks jsonb,
    rules_version bigint, -- version of the rules at the comparison; null: there were none
    reason text not null default '', -- details of the outcome
    primary key (id, day)
) partition by range (day);

create index pair_at on abreast.pair (at);
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
create function abreast.open_day(target date) returns boolean language plpgsql as $$
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

create function abreast.update_hourly_counts() returns trigger language plpgsql as $$
begin
    execute abreast.hourly_count_statement(case tg_op
        when 'INSERT' then 'select 1 as sign, * from inserted'
        when 'DELETE' then 'select -1 as sign, * from deleted'
        else 'select 1 as sign, * from inserted union all select -1, * from deleted'
    end);
    return null;
end $$;

create trigger pair_inserted after insert on abreast.pair
    referencing new table as inserted for each statement execute function abreast.update_hourly_counts();
create trigger pair_updated after update on abreast.pair
    referencing new table as inserted old table as deleted for each statement execute function abreast.update_hourly_counts();
create trigger pair_deleted after delete on abreast.pair
    referencing old table as deleted for each statement execute function abreast.update_hourly_counts();

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

-- Counters of findings that each rule explains, by release ids. They return to the finding when the rule ends.
create table abreast.rule_finding (
    rule_id integer not null references abreast.rule,
    finding_id bigint not null references abreast.finding on delete cascade,
    old_release integer not null,
    new_release integer not null,
    count bigint not null default 0,
    baseline_count bigint not null default 0,
    shape_explained bigint not null default 0,
    new_greater bigint not null default 0,
    new_smaller bigint not null default 0,
    repeat_checks bigint not null default 0,
    old_repeats bigint not null default 0,
    new_repeats bigint not null default 0,
    magnitude_up bigint not null default 0,
    magnitude_down bigint not null default 0,
    baseline_magnitude_up bigint not null default 0,
    baseline_magnitude_down bigint not null default 0,
    unknown bigint not null default 0, -- pairs from before the rule without stored answers
    primary key (rule_id, finding_id, old_release, new_release)
) with (fillfactor = 70);

create index rule_finding_finding on abreast.rule_finding (finding_id);

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
    -- {sampled: requests; old_shadow, new_shadow, old_baseline: intended copies; not_sent: copies that never left Envoy}
    totals jsonb not null,
    last_reading jsonb not null, -- the same since the start of the running process
    primary key (node, service)
);

-- Sampled requests of a service in steps of ten seconds. Retention folds dropped days into one row at -infinity.
create table abreast.envoy_count (
    service text not null,
    at timestamptz not null, -- start of the step
    sampled bigint not null,
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
    dropped as (
        select service, jsonb_object_agg(key, total) as counts
        from (
            select service, d.key, sum(d.value::bigint) as total
            from reported
            cross join lateral jsonb_each_text(
                case jsonb_typeof(report->'dropped') when 'object' then report->'dropped' else '{}' end
            ) as d
            where d.value ~ '^[0-9]{1,15}$'
            group by service, d.key
        ) as summed
        group by service
    )
    insert into abreast.process_report as stored (id, service, seen, report)
    select '(former) ' || service, service, max(seen),
           jsonb_build_object(
               'dropped', coalesce((select counts from dropped where dropped.service = reported.service), '{}'),
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
end $$;

-- Fold the counters of releases without stored pairs into one row, without release, of each endpoint and finding.
create function abreast.fold_releases() returns void language plpgsql as $$
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
        union
        select f.endpoint_id, r.old_release, r.new_release
        from abreast.rule_finding r join abreast.finding f on f.id = r.finding_id
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
    insert into abreast.finding_release as stored (
        finding_id, old_release, new_release, count, baseline_count, shape_explained, new_greater, new_smaller,
        repeat_checks, old_repeats, new_repeats, magnitude_up, magnitude_down, baseline_magnitude_up,
        baseline_magnitude_down, first_seen, last_seen
    )
    select finding_id, 0, 0, sum(count), sum(baseline_count), sum(shape_explained), sum(new_greater), sum(new_smaller),
           sum(repeat_checks), sum(old_repeats), sum(new_repeats), sum(magnitude_up), sum(magnitude_down),
           sum(baseline_magnitude_up), sum(baseline_magnitude_down), min(first_seen), max(last_seen)
    from deleted
    group by finding_id
    on conflict (finding_id, old_release, new_release) do update
    set count = stored.count + excluded.count, baseline_count = stored.baseline_count + excluded.baseline_count,
        shape_explained = stored.shape_explained + excluded.shape_explained,
        new_greater = stored.new_greater + excluded.new_greater,
        new_smaller = stored.new_smaller + excluded.new_smaller,
        repeat_checks = stored.repeat_checks + excluded.repeat_checks,
        old_repeats = stored.old_repeats + excluded.old_repeats,
        new_repeats = stored.new_repeats + excluded.new_repeats,
        magnitude_up = stored.magnitude_up + excluded.magnitude_up,
        magnitude_down = stored.magnitude_down + excluded.magnitude_down,
        baseline_magnitude_up = stored.baseline_magnitude_up + excluded.baseline_magnitude_up,
        baseline_magnitude_down = stored.baseline_magnitude_down + excluded.baseline_magnitude_down,
        first_seen = least(stored.first_seen, excluded.first_seen),
        last_seen = greatest(stored.last_seen, excluded.last_seen);

    with deleted as (
        delete from abreast.rule_finding r
        using abreast.finding f, former
        where f.id = r.finding_id
          and (former.endpoint_id, former.old_release, former.new_release) = (f.endpoint_id, r.old_release, r.new_release)
        returning r.*
    )
    insert into abreast.rule_finding as stored (
        rule_id, finding_id, old_release, new_release, count, baseline_count, shape_explained, new_greater, new_smaller,
        repeat_checks, old_repeats, new_repeats, magnitude_up, magnitude_down, baseline_magnitude_up,
        baseline_magnitude_down, unknown
    )
    select rule_id, finding_id, 0, 0, sum(count), sum(baseline_count), sum(shape_explained), sum(new_greater),
           sum(new_smaller), sum(repeat_checks), sum(old_repeats), sum(new_repeats), sum(magnitude_up),
           sum(magnitude_down), sum(baseline_magnitude_up), sum(baseline_magnitude_down), sum(unknown)
    from deleted
    group by rule_id, finding_id
    on conflict (rule_id, finding_id, old_release, new_release) do update
    set count = stored.count + excluded.count, baseline_count = stored.baseline_count + excluded.baseline_count,
        shape_explained = stored.shape_explained + excluded.shape_explained,
        new_greater = stored.new_greater + excluded.new_greater,
        new_smaller = stored.new_smaller + excluded.new_smaller,
        repeat_checks = stored.repeat_checks + excluded.repeat_checks,
        old_repeats = stored.old_repeats + excluded.old_repeats,
        new_repeats = stored.new_repeats + excluded.new_repeats,
        magnitude_up = stored.magnitude_up + excluded.magnitude_up,
        magnitude_down = stored.magnitude_down + excluded.magnitude_down,
        baseline_magnitude_up = stored.baseline_magnitude_up + excluded.baseline_magnitude_up,
        baseline_magnitude_down = stored.baseline_magnitude_down + excluded.baseline_magnitude_down,
        unknown = stored.unknown + excluded.unknown;

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
create function abreast.drop_day(target date) returns void language plpgsql as $$
declare
    following timestamptz := (target + 1)::timestamp at time zone 'UTC';
begin
    perform set_config('lock_timeout', '1s', true);
    execute format('drop table if exists abreast.%I', 'pair_' || to_char(target, 'YYYYMMDD'));
    update abreast.retention_state set dropped_until = greatest(dropped_until, target);
    delete from abreast.example where day <= target;
    delete from abreast.hourly_count where hour < following;
    with deleted as (
        delete from abreast.envoy_count where isfinite(at) and at < following returning service, sampled
    )
    insert into abreast.envoy_count as stored (service, at, sampled)
    select service, '-infinity', sum(sampled) from deleted group by service
    on conflict (service, at) do update set sampled = stored.sampled + excluded.sampled;
    with deleted as (
        delete from abreast.outcome_count where day <= target and isfinite(day) returning service, outcome, pairs
    )
    insert into abreast.outcome_count as stored (service, day, outcome, pairs)
    select service, '-infinity', outcome, sum(pairs) from deleted group by service, outcome
    on conflict (service, day, outcome) do update set pairs = stored.pairs + excluded.pairs;
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
    updated_at timestamptz not null default now(),
    check (new_share between 0 and 10000),
    check (sample_safe between 0 and 1000000),
    check (sample_unsafe between 0 and 1000000),
    check (baseline_share between 0 and 1000000)
);

-- Expect baseline copies at an endpoint while it has few pairs and some copies have come. Until there are enough, its
-- times prove nothing. `between` keeps the planner on pair_endpoint_at; with `=` it may scan the pairs of all endpoints.
create function abreast.expects_baseline(e abreast.endpoint, pairs bigint) returns boolean stable parallel safe
language sql return
    pairs < 1000 and e.method in ('GET', 'HEAD', 'OPTIONS')
    and exists (select from abreast.traffic t where t.service = e.service and t.baseline_share > 0)
    and (
        select coalesce(bool_or(newest.copied), false)
        from (
            select p.baseline_us is not null as copied
            from abreast.pair p
            where p.endpoint_id between e.id and e.id
            order by p.endpoint_id desc, p.at desc
            limit 1000
        ) as newest
    );

-- Audit log of traffic, guard and ramp.
create table abreast.traffic_event (
    id bigint generated always as identity primary key,
    uid uuid not null default gen_random_uuid(), -- id for webhook receivers, unique across databases
    service text not null,
    at timestamptz not null default now(),
    actor text not null,
    action text not null, -- create, update, rollback, promote, guard_*, ramp_*
    reason text not null,
    before jsonb,
    after jsonb not null,
    detail jsonb not null default '{}' -- {guard_before, guard_after, ramp_before, ramp_after}, where they apply
);

create index traffic_event_service on abreast.traffic_event (service, id desc);

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
    budget jsonb not null, -- {max_mismatch, max_error, max_slower, min_completeness, confidence}
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

-- Webhook receivers from the leader's settings, with delivery counters.
create table abreast.webhook_receiver (
    url text primary key,
    delivered bigint not null default 0,
    failed bigint not null default 0, -- attempts
    dropped bigint not null default 0 -- messages given up
);

-- Outbox: undelivered messages, one for each event and receiver, written in the event's transaction.
create table abreast.webhook_delivery (
    id bigint generated always as identity primary key,
    event_id bigint not null,
    url text not null references abreast.webhook_receiver on delete cascade,
    attempts integer not null default 0,
    due_at timestamptz not null default clock_timestamp(),
    unique (event_id, url)
);

create index webhook_delivery_url on abreast.webhook_delivery (url, due_at);

-- Write an event with its webhook messages, and notify all sidecars at the commit.
create function abreast.record_event(
    service text, at timestamptz, actor text, action text, reason text, before jsonb, after jsonb, detail jsonb
) returns void language sql as $$
    with written as (
        insert into abreast.traffic_event (service, at, actor, action, reason, before, after, detail)
        values ($1, $2, $3, $4, $5, $6, $7, $8)
        returning id
    )
    insert into abreast.webhook_delivery (event_id, url)
    select written.id, receiver.url from written cross join abreast.webhook_receiver receiver where $4 <> 'create';
    select pg_notify('abreast_traffic', $1)
$$;

-- Running sidecars and their connected Envoys. Unlogged: each sidecar writes its row every second.
create unlogged table abreast.sidecar (
    id uuid primary key, -- one per process
    address text not null, -- host and gRPC port
    seen timestamptz not null,
    -- [{service, node, peer, number, acknowledged_at, acknowledged_version, answered_at, answered_version, after, error}]
    envoys jsonb not null
);

-- Check the age in both directions: after a clock was set back, a time far in the future is as stale as an old one.
create function abreast.is_alive(seen timestamptz, expires float8) returns boolean language sql as
    'select abs(extract(epoch from clock_timestamp() - seen)) <= expires';
