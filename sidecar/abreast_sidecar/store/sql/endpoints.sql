with page as (
    select e.*
    from abreast.endpoint e
    where (%(service)s = '' or e.service = %(service)s)
      and (%(after_service)s::text is null
           or (e.service, e.route, e.method) > (%(after_service)s, %(after_route)s, %(after_method)s))
      and exists (
          select from abreast.pair p
          where p.endpoint_id = e.id
            and (%(start)s::timestamptz is null or p.at >= %(start)s)
            and (%(end)s::timestamptz is null or p.at < %(end)s)
      )
    order by e.service, e.route, e.method
    limit %(limit)s
)
select e.service, e.method, e.route, s.pairs, s.old_us, s.new_us, o.outcomes, f.findings
from page e
cross join lateral (
    select count(*) as pairs,
           percentile_cont(array[0.5, 0.99]) within group (order by p.old_us) as old_us,
           percentile_cont(array[0.5, 0.99]) within group (order by p.new_us) as new_us
    from abreast.pair p
    where p.endpoint_id = e.id
      and (%(start)s::timestamptz is null or p.at >= %(start)s)
      and (%(end)s::timestamptz is null or p.at < %(end)s)
) s
cross join lateral (
    select jsonb_object_agg(outcome, pairs) as outcomes
    from (
        select p.outcome, count(*) as pairs
        from abreast.pair p
        where p.endpoint_id = e.id
          and (%(start)s::timestamptz is null or p.at >= %(start)s)
          and (%(end)s::timestamptz is null or p.at < %(end)s)
        group by p.outcome
    ) by_outcome
) o
cross join lateral (
    select count(*) as findings
    from abreast.finding g
    where g.endpoint_id = e.id and abreast.open_regression(g)
      and case when abreast.of_no_pair(g)
              then g.count > 0 and g.last_seen >= coalesce(%(start)s::timestamptz, '-infinity')
               and g.first_seen < coalesce(%(end)s::timestamptz, 'infinity')
              when %(windowed)s
          then g.id in (
              select unnest(p.findings)
              from abreast.pair p
              where p.findings <> '{}'
                and (%(start)s::timestamptz is null or p.at >= %(start)s)
                and (%(end)s::timestamptz is null or p.at < %(end)s)
          )
          else g.count > 0 end
) f
order by e.service, e.route, e.method
