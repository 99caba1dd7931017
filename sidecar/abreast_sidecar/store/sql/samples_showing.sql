select features
from abreast.request_sample
where endpoint_id = (select endpoint_id from abreast.finding where id = %(id)s) and finding_id = %(id)s
order by slot
