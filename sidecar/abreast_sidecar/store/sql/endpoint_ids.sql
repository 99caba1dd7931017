select id
from abreast.endpoint
where (%(service)s = '' or service = %(service)s)
  and (%(method)s = '' or method = %(method)s)
  and (%(route)s = '' or route = %(route)s)
  and (%(findings)s::bigint[] is null
       or id in (select endpoint_id from abreast.finding where id = any(%(findings)s::bigint[])))
order by id
