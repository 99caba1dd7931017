-- What changes when a finding appears or grows.
select f.id, f.count, f.baseline_count, f.last_seen, f.state, f.status
from abreast.finding f join abreast.endpoint e on e.id = f.endpoint_id
where (%(service)s = '' or e.service = %(service)s) and (f.reason <> '' or f.state <> 'undecided')
