-- When users were last let onto new after a time without any: evidence from before is about what was then.
select max(at) as exposed
from abreast.traffic_event
where service = %(service)s and (after->>'new_share')::integer > 0
  and coalesce((before->>'new_share')::integer, 0) = 0
