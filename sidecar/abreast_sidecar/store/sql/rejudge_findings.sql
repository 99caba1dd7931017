select f.id, f.endpoint_id, f.part, f.path, f.kind, f.impact, f.status, e.service, e.method, e.route
from abreast.finding f join abreast.endpoint e on e.id = f.endpoint_id
where (%(ids)s::bigint[] is null or f.id = any(%(ids)s)) and not abreast.of_no_pair(f)
