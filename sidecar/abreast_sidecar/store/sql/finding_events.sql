select at, actor, before, after, release, reason
from abreast.finding_event
where finding_id = %(id)s
order by id desc
limit %(limit)s
