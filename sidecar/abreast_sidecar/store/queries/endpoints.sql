-- name: services
select service from abreast.traffic
union select service from abreast.endpoint
union select service from abreast.process_report
union select service from abreast.envoy_report
order by service

-- name: endpoints_add
insert into abreast.endpoint (service, method, route)
select service, method, route
from json_to_recordset(%(rows)s::json) as input (service text, method text, route text)
order by service, method, route
on conflict do nothing

-- name: endpoints_read
select service, method, route, id from abreast.endpoint where service = any(%(services)s)

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

-- name: endpoints_count
with input as (
    select id, old_release, new_release, compared, baseline_compared
    from json_to_recordset(%(rows)s::json) as input (
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
where endpoint.id = total.id

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
select e.service, e.method, e.route, e.outcomes, t.old_us, t.new_us, f.findings
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

-- name: release_add
-- Insert a release. Beyond the limit all labels of a service share one row, so that labels made for each process do no
-- harm.
insert into abreast.release (service, version, label)
select %(service)s, %(version)s, %(label)s
where (select count(*) from abreast.release where service = %(service)s) < %(limit)s
   or %(label)s = %(other)s
on conflict do nothing

-- name: release_ids
select service, version, label, id
from abreast.release
join unnest(%(services)s::text[], %(versions)s::text[], %(labels)s::text[]) as requested (service, version, label)
    using (service, version, label)

-- name: releases_read
select service, version, label, id from abreast.release where service = any(%(services)s)

-- name: release_newest
-- Return the release of new that the ledger saw first most recently, before the end of the window.
select label
from abreast.release
where service = %(service)s and version = 'new' and first_seen < coalesce(%(end)s::timestamptz, 'infinity')
order by id desc
limit 1

-- name: release_span
-- Return the period of a release. A pair without an answer of new names no release, so it belongs to the latest one.
select case when exists (
           select from abreast.release f where f.service = r.service and f.version = 'new' and f.id < r.id
       ) then first_seen end as start,
       (
           select min(first_seen) from abreast.release f
           where f.service = r.service and f.version = 'new' and f.id > r.id
       ) as stop
from abreast.release r
where service = %(service)s and version = 'new' and label = %(release)s::text
