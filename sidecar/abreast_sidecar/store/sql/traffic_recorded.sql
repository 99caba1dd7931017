-- Whether the call is recorded already, by this sidecar or another.
select id
from abreast.traffic_event
where service = %(service)s and after ->> 'call' = %(call)s
limit 1
