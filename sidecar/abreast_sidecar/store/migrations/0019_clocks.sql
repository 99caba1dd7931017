-- When a report was brought, by the clock of the sidecar that asked; `seen` is by Postgres's.
alter table abreast.envoy_report add column asked timestamptz;

drop function abreast.fold_reports(integer);

-- What processes and Envoys counted that are no more is one row of each service. Which they are is not for one clock to say.
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
