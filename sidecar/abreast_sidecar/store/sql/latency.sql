-- The newest pairs of one endpoint that both versions answered alike, in the order of their arrival.
select old_us, new_us, release, copy_us
from (
    select p.at, p.id, p.old_us, p.new_us, p.old_release || ' ' || p.new_release as release, p.copy_us
    from abreast.pair p
    where p.endpoint_id = (
              select id from abreast.endpoint
              where service = %(service)s and method = %(method)s and route = %(route)s
          )
      and p.outcome in ('match', 'mismatch') and p.old_status = p.new_status
      and p.old_us is not null and p.new_us is not null
      and (%(start)s::timestamptz is null or p.at >= %(start)s)
      and (%(end)s::timestamptz is null or p.at < %(end)s)
    order by p.at desc, p.id desc
    limit %(limit)s
) as newest
order by at, id
