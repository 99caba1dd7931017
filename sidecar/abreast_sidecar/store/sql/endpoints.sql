-- Times are of the newest pairs of each endpoint.
-- `between`: by an equal sign the planner may go through the pairs of all endpoints, back to an endpoint that is rare.
with inside as materialized (
    select endpoint_id, outcome, findings, sum(pairs)::bigint as pairs
    from abreast.sums(%(endpoints)s::integer[], %(start)s::timestamptz, %(end)s::timestamptz)
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
    where g.endpoint_id = e.id and abreast.open_regression(g)
      and case when abreast.of_no_pair(g)
          then g.count > 0 and g.last_seen >= coalesce(%(start)s::timestamptz, '-infinity')
           and g.first_seen < coalesce(%(end)s::timestamptz, 'infinity')
          when %(windowed)s
          then g.id in (select unnest(findings) from inside where findings <> '{}')
          else g.count > 0 end
) f
order by e.service, e.route, e.method
