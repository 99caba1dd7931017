select id, at, actor, action, reason, before, after, detail
from abreast.traffic_event
where service = %(service)s and (%(before_id)s::bigint is null or id < %(before_id)s)
order by id desc
limit %(limit)s
