-- The last day that retention dropped. Its pairs are not known any more, so that one of them which is delivered again
-- would count twice: none of these days takes any.
create table abreast.dropped (
    one boolean primary key default true check (one),
    until date not null
);

insert into abreast.dropped (until) values ('-infinity');

-- Entries that came for such a day. Whether they had been counted before is not known.
create table abreast.late (
    service text primary key,
    entries bigint not null
);

drop function abreast.open_day(date);

-- Whether the day takes pairs. Partitions are named pair_YYYYMMDD. Attaching, unlike `partition of`, lets readers and
-- writers of other days go on.
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

create or replace function abreast.drop_day(wanted date) returns void language plpgsql as $$
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

-- What is counted by releases of which no pair is kept is one row, without a release, of each endpoint and finding.
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

    -- In the order of all who write.
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

-- What processes and Envoys counted that are no more is one row of each service.
create function abreast.fold_reports(days integer) returns void language plpgsql as $$
declare
    oldest timestamptz := clock_timestamp() - days * interval '1 day';
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
