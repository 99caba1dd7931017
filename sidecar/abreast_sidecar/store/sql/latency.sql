-- Of the newest pairs of one endpoint those that both versions answered alike, in the order of their arrival, and whether
-- there are older pairs.
-- `between`: by an equal sign the planner may go through the pairs of all endpoints, back to an endpoint that is rare.
with endpoint as (
    select id from abreast.endpoint where service = %(service)s and method = %(method)s and route = %(route)s
),
newest as materialized (
    select p.at, p.id, p.outcome, p.old_status, p.new_status, p.old_us, p.new_us,
           p.old_release || ' ' || p.new_release as release, p.copy_us
    from abreast.pair p
    where p.endpoint_id between (select id from endpoint) and (select id from endpoint)
      and (%(start)s::timestamptz is null or p.at >= %(start)s)
      and (%(end)s::timestamptz is null or p.at < %(end)s)
    order by p.endpoint_id desc, p.at desc, p.id desc
    limit %(most)s + 1
)
select old_us, new_us, release, copy_us, (select count(*) > %(most)s from newest) as more
from (select * from newest order by at desc, id desc limit %(most)s) as taken
where outcome in ('match', 'mismatch') and old_status = new_status and old_us is not null and new_us is not null
order by at, id
