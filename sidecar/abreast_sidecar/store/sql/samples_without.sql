-- Of the requests of its endpoint that were taken at random, those that do not show a finding.
select features
from abreast.request_sample
where endpoint_id = (select endpoint_id from abreast.finding where id = %(id)s) and finding_id = 0
  and not findings @> array[%(id)s::bigint]
order by slot
