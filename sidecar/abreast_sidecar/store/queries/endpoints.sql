-- name: services
select service from abreast.traffic
union select service from abreast.endpoint
union select service from abreast.process_report
union select service from abreast.envoy_report
order by service

-- name: endpoints_add
-- Insert endpoints, or set the source of their routes if it has a higher precedence.
insert into abreast.endpoint as stored (service, method, route, source)
select service, method, route, source
from json_to_recordset(%(rows)s::json) as input (service text, method text, route text, source text)
order by service, method, route
on conflict (service, method, route) do update set source = excluded.source
where array_position(%(precedence)s::text[], excluded.source) < array_position(%(precedence)s::text[], stored.source)

-- name: endpoints_read
select service, method, route, id, source, abreast.get_pool(endpoint), compared, abreast.is_safe(method)
from abreast.endpoint
where service = any(%(services)s)

-- name: endpoints_from_paths
select id, service, method, route, source, compared
from abreast.endpoint
where source in ('path', 'learned', 'openapi', 'configured')
order by id

-- name: endpoints_merge
select abreast.merge_endpoints(%(origins)s::integer[], %(targets)s::integer[], %(kept_marks)s, %(max_examples)s)

-- name: templates_read
select source, service, method, path from abreast.endpoint_template order by source, service, method, path

-- name: templates_add
insert into abreast.endpoint_template (source, service, method, path)
select source, service, method, path
from json_to_recordset(%(rows)s::json) as input (source text, service text, method text, path text)
order by source, service, method, path
on conflict do nothing

-- name: templates_delete
delete from abreast.endpoint_template
where (source, service, method, path) in (
    select source, service, method, path
    from json_to_recordset(%(rows)s::json) as input (source text, service text, method text, path text)
)

-- name: endpoint_ids
select id
from abreast.endpoint
where (%(service)s = '' or service = %(service)s)
  and (%(method)s = '' or method = %(method)s)
  and (%(route)s = '' or route = %(route)s)
  and (%(findings)s::bigint[] is null
       or id in (select endpoint_id from abreast.finding where id = any(%(findings)s::bigint[])))
order by id

-- name: endpoints_lock
-- The fixed order prevents deadlocks between workers.
select from abreast.endpoint where id = any(%(ids)s) order by id for no key update

-- name: endpoints_list
-- Percentiles come from the newest pairs of each endpoint.
-- `between` keeps the planner on pair_endpoint_at; with `=` it may scan the pairs of all endpoints.
with inside as materialized (
    select endpoint_id, outcome, findings, sum(pairs)::bigint as pairs
    from abreast.pair_counts(%(endpoints)s::integer[], %(start)s::timestamptz, %(end)s::timestamptz)
    group by endpoint_id, outcome, findings
    having sum(pairs) > 0
),
by_outcome as (
    select endpoint_id, jsonb_object_agg(outcome, pairs) as outcomes
    from (select endpoint_id, outcome, sum(pairs) as pairs from inside group by endpoint_id, outcome) as counted
    group by endpoint_id
),
page as (
    select e.*, o.outcomes
    from abreast.endpoint e
    join by_outcome o on o.endpoint_id = e.id
    where %(after_service)s::text is null
       or (e.service, e.route, e.method) > (%(after_service)s, %(after_route)s, %(after_method)s)
    order by e.service, e.route, e.method
    limit %(limit)s
)
select (select count(*) from by_outcome) as total, e.service, e.method, e.route, e.source, e.outcomes, t.old_us, t.new_us,
       f.findings
from page e
cross join lateral (
    select percentile_cont(array[0.5, 0.99]) within group (order by old_us) as old_us,
           percentile_cont(array[0.5, 0.99]) within group (order by new_us) as new_us
    from (
        select p.old_us, p.new_us
        from abreast.pair p
        where p.endpoint_id between e.id and e.id
          and (%(start)s::timestamptz is null or p.at >= %(start)s)
          and (%(end)s::timestamptz is null or p.at < %(end)s)
        order by p.endpoint_id desc, p.at desc
        limit %(newest)s
    ) as newest
) t
cross join lateral (
    select count(*) as findings
    from abreast.finding g
    where g.endpoint_id = e.id and abreast.is_open_regression(g)
      and case when abreast.is_aggregate(g)
          then g.count > 0 and g.last_seen >= coalesce(%(start)s::timestamptz, '-infinity')
           and g.first_seen < coalesce(%(end)s::timestamptz, 'infinity')
          when %(windowed)s
          then g.id in (select unnest(findings) from inside where findings <> '{}')
          else g.count > 0 end
) f
order by e.service, e.route, e.method

-- name: releases_add
-- Insert releases in their order. Beyond the limit all labels of a service share one row, so that labels made for each
-- process do no harm.
with requested as (
    select *, row_number() over (partition by service order by position) as place
    from unnest(%(services)s::text[], %(versions)s::text[], %(labels)s::text[])
        with ordinality as item (service, version, label, position)
), stored as (
    select service, count(*) as releases from abreast.release where service = any(%(services)s) group by service
)
insert into abreast.release (service, version, label)
select service, version, label
from requested left join stored using (service)
where coalesce(releases, 0) + place <= %(limit)s or label = %(other)s
order by position
on conflict do nothing

-- name: release_ids
select service, version, label, id
from abreast.release
join unnest(%(services)s::text[], %(versions)s::text[], %(labels)s::text[]) as requested (service, version, label)
    using (service, version, label)

-- name: releases_read
select service, version, label, id from abreast.release where service = any(%(services)s)

-- name: release_newest
-- Return the release of new that the ledger saw first most recently, before the end of the window. Services with labels
-- also have captures without one.
select label
from abreast.release
where service = %(service)s and version = 'new' and first_seen < coalesce(%(end)s::timestamptz, 'infinity')
order by label = '', id desc
limit 1

-- name: release_known
select id
from abreast.release
where (%(service)s = '' or service = %(service)s) and version = 'new' and label = %(label)s
limit 1

-- name: release_span
-- Return the period of a release. Pairs without a label, or without a response of new, belong to the latest one.
select case when exists (
           select from abreast.release f where f.service = r.service and f.version = 'new' and f.id < r.id
       ) then first_seen end as start,
       (
           select min(first_seen) from abreast.release f
           where f.service = r.service and f.version = 'new' and f.id > r.id and f.label <> ''
       ) as stop
from abreast.release r
where service = %(service)s and version = 'new' and label = %(release)s::text
