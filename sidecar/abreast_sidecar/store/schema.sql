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
    judged_compared bigint not null default 0,
    judged_baseline bigint not null default 0,
    unique (service, method, route)
) with (fillfactor = 70); -- counters change often: free space on the page saves index updates

-- Labels of code. Of two releases of a version, the greater id came later.
create table abreast.release (
    id integer generated always as identity primary key,
    service text not null,
    version text not null, -- old, new
    label text not null, -- empty if the service sends none
    first_seen timestamptz not null default clock_timestamp(),
    unique (service, version, label)
);

-- All differences with one cause. `state` is a statistical decision; `status` is a decision of people.
-- Counters serve order and `state`; a listing of a window counts pairs.
create table abreast.finding (
    id bigint generated always as identity primary key,
    endpoint_id integer not null references abreast.endpoint,
    part text not null, -- status, header, body, effect, error, latency, cache
    path text not null, -- generalised: $.items[*].price, the name of a header, or empty
    kind text not null, -- added, removed, changed, type, order, ...
    impact text not null, -- breaking, value, additive
    count bigint not null default 0, -- pairs of old and new that show it
    baseline_count bigint not null default 0, -- pairs of old and old that show it
    explained bigint not null default 0, -- part of `count`: value shapes explain every difference
    new_greater bigint not null default 0, -- part of `count`, by the first value; absent and null are the least
    new_smaller bigint not null default 0,
    -- Consecutive pairs of one worker: how often it compared, and how often a version repeated a recent value.
    turns bigint not null default 0,
    old_again bigint not null default 0,
    new_again bigint not null default 0,
    -- Numbers of new above twice, or below half of old's; then the same for baseline copies.
    far_more bigint not null default 0,
    far_less bigint not null default 0,
    copies_far_more bigint not null default 0,
    copies_far_less bigint not null default 0,
    drift bigint not null default 0, -- pairs that a recheck explained as drift of state; not in `count`
    state text not null default 'undecided', -- real, noise, undecided
    reason text not null default '', -- reason for `state`; empty before the first decision
    status text not null default 'open'
        check (status in ('open', 'confirmed', 'expected', 'fixed', 'reopened')),
    status_since timestamptz, -- null: nobody has set a status
    fixed_after integer, -- the last release of new that may show a fixed finding; a later one reopens it
    replaced integer not null default 0, -- examples that smaller ones replaced
    first_seen timestamptz not null,
    last_seen timestamptz not null,
    -- Latency: {old_p50_us, new_p50_us, old_p99_us, new_p99_us, ratio, pairs}.
    -- Other parts: {place, old, new} of the first pair, values as JSON text or null.
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
    explained bigint not null default 0,
    new_greater bigint not null default 0,
    new_smaller bigint not null default 0,
    turns bigint not null default 0,
    old_again bigint not null default 0,
    new_again bigint not null default 0,
    far_more bigint not null default 0,
    far_less bigint not null default 0,
    copies_far_more bigint not null default 0,
    copies_far_less bigint not null default 0,
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
create function abreast.open_regression(f abreast.finding) returns boolean language sql immutable as $$
    select (f.status = 'confirmed' or (f.impact <> 'additive' and f.state <> 'noise'))
       and f.status not in ('expected', 'fixed')
$$;

-- Detectors report these findings from many pairs. No single pair shows one, and the noise job leaves them alone.
create function abreast.of_no_pair(f abreast.finding) returns boolean language sql immutable as $$
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
    copy_us integer, -- time of old for the baseline copy, if old also answered the user
    old_release text not null default '',
    new_release text not null default '',
    old_hits integer, -- cache lookups, if the version reported any
    old_misses integer,
    new_hits integer,
    new_misses integer,
    baseline boolean, -- a baseline copy differed; null: none was compared
    findings bigint[] not null default '{}', -- ids; old against new, not explained by rules
    explained bigint[], -- findings that rules explain, with the rule at the same index
    explained_by integer[],
    noise bigint[] not null default '{}', -- the same for old against old
    noise_explained bigint[],
    noise_explained_by integer[],
    drift bigint[], -- findings that a recheck explained as drift of state
    rules bigint, -- version of the rules at the comparison; null: there were none
    reason text not null default '', -- details of the outcome
    primary key (id, day)
) partition by range (day);

create index pair_at on abreast.pair (at);
create index pair_endpoint_at on abreast.pair (endpoint_id, at);
create index pair_outcome_at on abreast.pair (outcome, at) where outcome <> 'match';
create index pair_findings on abreast.pair using gin (findings) where findings <> '{}';
create index pair_noise on abreast.pair using gin (noise) where noise <> '{}';
create index pair_explained on abreast.pair using gin (explained) where explained is not null;
create index pair_explained_by on abreast.pair using gin (explained_by) where explained_by is not null;
create index pair_noise_explained_by on abreast.pair using gin (noise_explained_by) where noise_explained_by is not null;
create index pair_drift on abreast.pair using gin (drift) where drift is not null;
-- Few pairs show or hide a finding: a listing of a window reads only those.
create index pair_showing_at on abreast.pair (at) where findings <> '{}';
create index pair_hidden_at on abreast.pair (at) where explained is not null or drift is not null;

-- Totals of pairs by service, day and outcome. Retention folds dropped days into one row at -infinity.
create table abreast.tally (
    service text not null,
    day date not null,
    outcome text not null,
    pairs bigint not null,
    primary key (service, day, outcome)
) with (fillfactor = 70);

-- The last day that retention dropped. A pair of such a day is rejected, because the ledger can't know it any more and
-- would count it twice.
create table abreast.dropped (
    one boolean primary key default true check (one),
    until date not null
);

insert into abreast.dropped (until) values ('-infinity');

-- Entries rejected because their day is dropped. The ledger may have counted some of them before.
create table abreast.late (
    service text primary key,
    entries bigint not null
);

-- Open a day's partition, named pair_YYYYMMDD. Return false for a dropped day. Attaching a table, unlike `partition of`,
-- does not block other days.
create function abreast.open_day(wanted date) returns boolean language plpgsql as $$
declare
    name text := 'pair_' || to_char(wanted, 'YYYYMMDD');
begin
    perform pg_advisory_xact_lock(hashtext('abreast.open_day'));
    if wanted <= (select until from abreast.dropped) then
        return false;
    end if;
    if to_regclass('abreast.' || name) is null then
        execute format('create table abreast.%I (like abreast.pair including all excluding indexes)', name);
        execute format('alter table abreast.pair attach partition abreast.%I for values from (%L) to (%L)',
                       name, wanted, wanted + 1);
    end if;
    return true;
end $$;

-- Pair counts by hour (UTC) and by all columns that a listing or a verdict counts, so that a window needs few rows.
-- Triggers on `pair` keep it; it is dropped with its day.
create table abreast.hour (
    endpoint_id integer not null,
    hour timestamptz not null, -- its start
    outcome text not null,
    old_release text not null,
    new_release text not null,
    old_status smallint,
    new_status smallint,
    shown bytea not null, -- digest of the next four columns, for the key
    findings bigint[] not null, -- sorted
    explained bigint[],
    explained_by integer[],
    drift bigint[],
    pairs bigint not null, -- 0 after all of them changed
    first timestamptz not null,
    last timestamptz not null,
    constraint hour_key unique nulls not distinct
        (endpoint_id, hour, outcome, old_release, new_release, old_status, new_status, shown)
) with (fillfactor = 70);

create index hour_hour on abreast.hour (hour);

create function abreast.in_order(bigint[]) returns bigint[] language sql immutable as $$
    select case when cardinality($1) < 2 then $1 else array(select distinct unnest($1) order by 1) end
$$;

-- Build the statement that adds pairs to the hourly counts, or subtracts them with a sign of -1. A fixed order prevents
-- deadlocks between workers.
create function abreast.summing(source text) returns text language sql immutable as $$
    select format($f$
        insert into abreast.hour as known (
            endpoint_id, hour, outcome, old_release, new_release, old_status, new_status, shown, findings, explained,
            explained_by, drift, pairs, first, last
        )
        select endpoint_id, hour, outcome, old_release, new_release, old_status, new_status,
               case when findings = '{}' and explained is null and drift is null then ''
                    else sha256(convert_to(row(findings, explained, explained_by, drift)::text, 'UTF8')) end as shown,
               findings, explained, explained_by, drift, sum(sign), min(at), max(at)
        from (
            select sign, endpoint_id, date_trunc('hour', at, 'UTC') as hour, outcome, old_release, new_release,
                   old_status, new_status, abreast.in_order(findings) as findings, explained, explained_by, drift, at
            from (%s) as changed
        ) as told
        group by endpoint_id, hour, outcome, old_release, new_release, old_status, new_status, findings, explained,
                 explained_by, drift
        having sum(sign) <> 0
        order by endpoint_id, hour, outcome, old_release, new_release, old_status, new_status, shown
        on conflict on constraint hour_key do update
        set pairs = known.pairs + excluded.pairs, first = least(known.first, excluded.first),
            last = greatest(known.last, excluded.last)
    $f$, source)
$$;

create function abreast.sum_up() returns trigger language plpgsql as $$
begin
    execute abreast.summing(case tg_op
        when 'INSERT' then 'select 1 as sign, * from added'
        when 'DELETE' then 'select -1 as sign, * from gone'
        else 'select 1 as sign, * from added union all select -1, * from gone'
    end);
    return null;
end $$;

create trigger pair_added after insert on abreast.pair
    referencing new table as added for each statement execute function abreast.sum_up();
create trigger pair_changed after update on abreast.pair
    referencing new table as added old table as gone for each statement execute function abreast.sum_up();
create trigger pair_gone after delete on abreast.pair
    referencing old table as gone for each statement execute function abreast.sum_up();

-- Return the counts of a window: hourly counts of its whole hours, and pairs of the partial hours at both ends.
create function abreast.sums(endpoints integer[], start timestamptz, over timestamptz) returns table (
    endpoint_id integer, outcome text, old_release text, new_release text, old_status smallint, new_status smallint,
    findings bigint[], explained bigint[], explained_by integer[], drift bigint[], pairs bigint, first timestamptz,
    last timestamptz
) language sql stable as $$
    select h.endpoint_id, h.outcome, h.old_release, h.new_release, h.old_status, h.new_status, h.findings, h.explained,
           h.explained_by, h.drift, h.pairs, h.first, h.last
    from abreast.hour h
    where h.endpoint_id = any(endpoints)
      and h.hour >= date_trunc('hour', coalesce(start, '-infinity') + interval '3599.999999 seconds', 'UTC')
      and h.hour < date_trunc('hour', coalesce(over, 'infinity'), 'UTC')
    union all
    select p.endpoint_id, p.outcome, p.old_release, p.new_release, p.old_status, p.new_status, p.findings, p.explained,
           p.explained_by, p.drift, 1, p.at, p.at
    from abreast.pair p
    where p.endpoint_id = any(endpoints)
      and p.at >= start and p.day >= (start at time zone 'UTC')::date
      and p.at < least(over, date_trunc('hour', start + interval '3599.999999 seconds', 'UTC'))
      and p.day <= (least(over, date_trunc('hour', start + interval '3599.999999 seconds', 'UTC')) at time zone 'UTC')::date
    union all
    select p.endpoint_id, p.outcome, p.old_release, p.new_release, p.old_status, p.new_status, p.findings, p.explained,
           p.explained_by, p.drift, 1, p.at, p.at
    from abreast.pair p
    where p.endpoint_id = any(endpoints)
      and p.at < over and p.day <= (over at time zone 'UTC')::date
      and p.at >= greatest(
          date_trunc('hour', over, 'UTC'), date_trunc('hour', start + interval '3599.999999 seconds', 'UTC')
      )
      and p.day >= (date_trunc('hour', over, 'UTC') at time zone 'UTC')::date
$$;

-- Pairs stored whole, a bounded number for each finding.
create table abreast.example (
    day date not null,
    pair_id text not null,
    captures bytea not null, -- zstd of the captures, each after its length (4 bytes, big-endian)
    differences jsonb not null, -- [{part, path, place, kind, impact, old, new}]
    primary key (day, pair_id)
);

create table abreast.finding_example (
    finding_id bigint not null references abreast.finding on delete cascade,
    day date not null,
    pair_id text not null,
    size integer not null, -- bytes of both response bodies
    primary key (finding_id, day, pair_id),
    foreign key (day, pair_id) references abreast.example on delete cascade
);

create index example_finding on abreast.finding_example (day, pair_id);

-- Stream entries that the worker could not process.
create table abreast.poison (
    id bigint generated always as identity primary key,
    at timestamptz not null,
    service text not null,
    entry text not null, -- id in Redis's stream
    reason text not null,
    content bytea not null,
    unique (service, entry)
);

-- Rules

-- Rules are immutable: a change ends one and begins another. `began` and `ended` are versions of the rules, which need
-- no clock.
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
    began bigint not null,
    ended bigint, -- null: in force
    ended_at timestamptz,
    ended_by text -- `abreast` for an expired rule
);

create unique index rule_name on abreast.rule (source, name) where ended is null;

-- Each change of the rules increments `version`. `listed` is the version for which rejudge was last filled, and `judged`
-- the version that all stored pairs reflect.
create table abreast.rule_state (
    one boolean primary key default true check (one),
    version bigint not null default 0,
    listed bigint not null default 0,
    judged bigint not null default 0
);

insert into abreast.rule_state default values;

-- Stored pairs that a change of the rules may concern, until the rules are reapplied to them.
create table abreast.rejudge (
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
    explained bigint not null default 0,
    new_greater bigint not null default 0,
    new_smaller bigint not null default 0,
    unknown bigint not null default 0, -- pairs from before the rule without stored answers
    primary key (rule_id, finding_id, old_release, new_release)
) with (fillfactor = 70);

create index rule_finding_finding on abreast.rule_finding (finding_id);

-- Return the version of the rules and hold it until the transaction ends, so that a batch commits under its own rules.
create function abreast.hold_rules() returns bigint language plpgsql as $$
begin
    perform pg_advisory_xact_lock_shared(hashtext('abreast.rules'));
    return (select version from abreast.rule_state);
end $$;

-- Wait for those who hold the rules, increment the version, and notify all sidecars at the commit.
create function abreast.change_rules() returns bigint language plpgsql as $$
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

-- The last report of each Redis shard. Cumulative over restarts of Redis: received, duplicate, late, shed_pairs,
-- shed_bytes, joined, swept. Current: waiting, ready, bytes. Bookkeeping of the sums: life, base, last.
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
    asked timestamptz, -- by the sidecar's clock
    -- {sampled: requests; old_shadow, new_shadow, old_baseline: intended copies; not_sent: copies that never left Envoy}
    counted jsonb not null,
    last jsonb not null, -- the same since the start of the running process
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
create function abreast.envoy_sampled(wanted text, start timestamptz, over timestamptz) returns bigint
language sql stable as $$
    with known as (
        select sum((counted->>'sampled')::bigint)::bigint as total from abreast.envoy_report where service = wanted
    ),
    placed as (
        select coalesce(sum(sampled), 0) as total from abreast.envoy_count where service = wanted
    ),
    inside as (
        select coalesce(sum(sampled * case
                   when span.until <= at then 1
                   else extract(epoch from least(span.until, over) - greatest(at, start))
                      / extract(epoch from span.until - at) end), 0) as total
        from abreast.envoy_count
        cross join lateral (select least(at + interval '10 seconds', clock_timestamp()) as until) as span
        where service = wanted and isfinite(at)
          and at > coalesce(start, '-infinity') - interval '10 seconds' and at < coalesce(over, 'infinity')
          and span.until > coalesce(start, '-infinity')
    )
    select case when start is null and over is null then known.total
                else round(inside.total)::bigint + greatest(known.total - placed.total, 0)::bigint end
    from known, placed, inside
$$;

-- Fold the reports of stopped processes and Envoys into one row for each service. The caller passes the cutoff,
-- because no single clock is trusted.
create function abreast.fold_reports(oldest timestamptz) returns void language plpgsql as $$
begin
    with gone as (
        delete from abreast.process_report where seen < oldest and id <> '(former) ' || service returning service, seen, report
    ),
    told as (
        select service, seen, report from gone
        union all
        select service, seen, report from abreast.process_report where id = '(former) ' || service
    ),
    dropped as (
        select service, jsonb_object_agg(key, total) as counts
        from (
            select service, d.key, sum(d.value::bigint) as total
            from told
            cross join lateral jsonb_each_text(
                case jsonb_typeof(report->'dropped') when 'object' then report->'dropped' else '{}' end
            ) as d
            where d.value ~ '^[0-9]{1,15}$'
            group by service, d.key
        ) as summed
        group by service
    )
    insert into abreast.process_report as known (id, service, seen, report)
    select '(former) ' || service, service, max(seen),
           jsonb_build_object(
               'dropped', coalesce((select counts from dropped where dropped.service = told.service), '{}'),
               'late_effects', coalesce(
                   sum((report->>'late_effects')::bigint) filter (where report->>'late_effects' ~ '^[0-9]{1,15}$'), 0
               )
           )
    from told
    where service in (select service from gone)
    group by service
    on conflict (id) do update set seen = excluded.seen, report = excluded.report;

    with gone as (
        delete from abreast.envoy_report where seen < oldest and node <> '(former)' returning service, seen, counted
    ),
    told as (
        select service, seen, counted from gone
        union all
        select service, seen, counted from abreast.envoy_report where node = '(former)'
    )
    insert into abreast.envoy_report as known (node, service, seen, counted, last)
    select '(former)', service, max(seen),
           (
               select jsonb_object_agg(key, total)
               from (
                   select c.key, sum(c.value::bigint) as total
                   from told one cross join lateral jsonb_each_text(one.counted) as c
                   where one.service = told.service
                   group by c.key
               ) as summed
           ),
           '{}'
    from told
    where service in (select service from gone)
    group by service
    on conflict (node, service) do update set seen = excluded.seen, counted = excluded.counted;
end $$;

-- Fold the counters of releases without stored pairs into one row, without release, of each endpoint and finding.
create function abreast.fold_releases() returns void language plpgsql as $$
begin
    create temporary table former on commit drop as
    with kept as materialized (
        select distinct endpoint_id, old_release, new_release from abreast.hour where pairs > 0
    ),
    known as (
        select endpoint_id, old_release, new_release from abreast.endpoint_release
        union
        select f.endpoint_id, r.old_release, r.new_release
        from abreast.finding_release r join abreast.finding f on f.id = r.finding_id
        union
        select f.endpoint_id, r.old_release, r.new_release
        from abreast.rule_finding r join abreast.finding f on f.id = r.finding_id
    )
    select known.*
    from known
    left join abreast.release o on o.id = known.old_release
    left join abreast.release n on n.id = known.new_release
    where (known.old_release, known.new_release) <> (0, 0)
      and coalesce(o.label, '') <> '(other)' and coalesce(n.label, '') <> '(other)'
      and not exists (
          select from kept
          where kept.endpoint_id = known.endpoint_id
            and (known.old_release = 0 or kept.old_release = o.label)
            and (known.new_release = 0 or kept.new_release = n.label)
      );

    -- The lock order of all writers.
    perform from abreast.finding where endpoint_id in (select endpoint_id from former) order by id for no key update;

    with gone as (
        delete from abreast.finding_release r
        using abreast.finding f, former
        where f.id = r.finding_id
          and (former.endpoint_id, former.old_release, former.new_release) = (f.endpoint_id, r.old_release, r.new_release)
        returning r.*
    )
    insert into abreast.finding_release as known (
        finding_id, old_release, new_release, count, baseline_count, explained, new_greater, new_smaller, first_seen,
        last_seen, turns, old_again, new_again
    )
    select finding_id, 0, 0, sum(count), sum(baseline_count), sum(explained), sum(new_greater), sum(new_smaller),
           min(first_seen), max(last_seen), sum(turns), sum(old_again), sum(new_again)
    from gone
    group by finding_id
    on conflict (finding_id, old_release, new_release) do update
    set count = known.count + excluded.count, baseline_count = known.baseline_count + excluded.baseline_count,
        explained = known.explained + excluded.explained, new_greater = known.new_greater + excluded.new_greater,
        new_smaller = known.new_smaller + excluded.new_smaller,
        first_seen = least(known.first_seen, excluded.first_seen), last_seen = greatest(known.last_seen, excluded.last_seen),
        turns = known.turns + excluded.turns, old_again = known.old_again + excluded.old_again,
        new_again = known.new_again + excluded.new_again;

    with gone as (
        delete from abreast.rule_finding r
        using abreast.finding f, former
        where f.id = r.finding_id
          and (former.endpoint_id, former.old_release, former.new_release) = (f.endpoint_id, r.old_release, r.new_release)
        returning r.*
    )
    insert into abreast.rule_finding as known (
        rule_id, finding_id, old_release, new_release, count, baseline_count, explained, new_greater, new_smaller, unknown
    )
    select rule_id, finding_id, 0, 0, sum(count), sum(baseline_count), sum(explained), sum(new_greater), sum(new_smaller),
           sum(unknown)
    from gone
    group by rule_id, finding_id
    on conflict (rule_id, finding_id, old_release, new_release) do update
    set count = known.count + excluded.count, baseline_count = known.baseline_count + excluded.baseline_count,
        explained = known.explained + excluded.explained, new_greater = known.new_greater + excluded.new_greater,
        new_smaller = known.new_smaller + excluded.new_smaller, unknown = known.unknown + excluded.unknown;

    perform from abreast.endpoint where id in (select endpoint_id from former) order by id for no key update;

    with gone as (
        delete from abreast.endpoint_release r
        using former
        where (former.endpoint_id, former.old_release, former.new_release) = (r.endpoint_id, r.old_release, r.new_release)
        returning r.*
    )
    insert into abreast.endpoint_release as known (endpoint_id, old_release, new_release, compared, baseline_compared)
    select endpoint_id, 0, 0, sum(compared), sum(baseline_compared)
    from gone
    group by endpoint_id
    on conflict (endpoint_id, old_release, new_release) do update
    set compared = known.compared + excluded.compared,
        baseline_compared = known.baseline_compared + excluded.baseline_compared;
    drop table former;
end $$;

-- Drop a day's partition and fold its totals. Wait at most a second for readers, because all others would wait behind it.
create function abreast.drop_day(wanted date) returns void language plpgsql as $$
declare
    following timestamptz := (wanted + 1)::timestamp at time zone 'UTC';
begin
    perform set_config('lock_timeout', '1s', true);
    execute format('drop table if exists abreast.%I', 'pair_' || to_char(wanted, 'YYYYMMDD'));
    update abreast.dropped set until = greatest(until, wanted);
    delete from abreast.example where day <= wanted;
    delete from abreast.hour where hour < following;
    with gone as (
        delete from abreast.envoy_count where isfinite(at) and at < following returning service, sampled
    )
    insert into abreast.envoy_count as known (service, at, sampled)
    select service, '-infinity', sum(sampled) from gone group by service
    on conflict (service, at) do update set sampled = known.sampled + excluded.sampled;
    with gone as (
        delete from abreast.tally where day <= wanted and isfinite(day) returning service, outcome, pairs
    )
    insert into abreast.tally as known (service, day, outcome, pairs)
    select service, '-infinity', outcome, sum(pairs) from gone group by service, outcome
    on conflict (service, day, outcome) do update set pairs = known.pairs + excluded.pairs;
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
create function abreast.copies_to_come(e abreast.endpoint, pairs bigint) returns boolean stable parallel safe
language sql return
    pairs < 1000 and e.method in ('GET', 'HEAD', 'OPTIONS')
    and exists (select from abreast.traffic t where t.service = e.service and t.baseline_share > 0)
    and (
        select coalesce(bool_or(newest.copied), false)
        from (
            select p.copy_us is not null as copied
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
    fired jsonb not null default '{}', -- {rule: time of its last rollback, or of one it would have made}
    state text not null default 'waiting', -- idle, clear, breached, blind; waiting: not checked yet
    said text not null default '', -- reason for `state`
    looked_at timestamptz
);

-- Automatic increase of new's share in steps. At most one ramp of a service is active.
create table abreast.ramp (
    id bigint generated always as identity primary key,
    service text not null,
    state text not null, -- progressing, paused; ended: succeeded, failed, aborted, superseded
    steps integer[] not null, -- shares of new, in hundredths of a percent
    step integer not null default 0, -- index of the current share in `steps`
    hold float8 not null, -- least duration of a step, in seconds
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
    said text not null default '', -- the condition that the ramp waits for, or its end
    looked_at timestamptz,
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
create table abreast.webhook (
    id bigint generated always as identity primary key,
    event_id bigint not null,
    url text not null references abreast.webhook_receiver on delete cascade,
    attempts integer not null default 0,
    due timestamptz not null default clock_timestamp(),
    unique (event_id, url)
);

create index webhook_url on abreast.webhook (url, due);

-- Write an event with its webhook messages, and notify all sidecars at the commit.
create function abreast.record_event(
    service text, at timestamptz, actor text, action text, reason text, before jsonb, after jsonb, detail jsonb
) returns void language sql as $$
    with written as (
        insert into abreast.traffic_event (service, at, actor, action, reason, before, after, detail)
        values ($1, $2, $3, $4, $5, $6, $7, $8)
        returning id
    )
    insert into abreast.webhook (event_id, url)
    select written.id, receiver.url from written cross join abreast.webhook_receiver receiver where $4 <> 'create';
    select pg_notify('abreast_traffic', $1)
$$;

-- Running sidecars and their connected Envoys. Unlogged: each sidecar writes its row every second.
create unlogged table abreast.replica (
    id uuid primary key, -- of one process
    sidecar text not null, -- host and gRPC port
    seen timestamptz not null,
    -- [{service, node, peer, number, acknowledged_at, acknowledged_version, answered_at, answered_version, after, error}]
    envoys jsonb not null
);

-- Check the age in both directions: after a clock was set back, a time far in the future is as stale as an old one.
create function abreast.is_alive(seen timestamptz, expires float8) returns boolean language sql as
    'select abs(extract(epoch from clock_timestamp() - seen)) <= expires';
