select service, policy, since, fired, state, said, looked_at, clock_timestamp() as now
from abreast.guard
where %(service)s::text is null or service = %(service)s
order by service
