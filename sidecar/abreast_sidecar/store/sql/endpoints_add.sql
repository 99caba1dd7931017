insert into abreast.endpoint (service, method, route)
select service, method, route
from json_to_recordset(%(given)s::json) as given (service text, method text, route text)
order by service, method, route
on conflict do nothing
