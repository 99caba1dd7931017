select f.id, count(e.size), coalesce(max(e.size), 0), f.replaced
from abreast.finding f left join abreast.finding_example e on e.finding_id = f.id
where f.id = any(%(ids)s)
group by f.id
