-- Of the new version, that the ledger saw first latest, before the window's end.
select label
from abreast.release
where service = %(service)s and version = 'new' and first_seen < coalesce(%(end)s::timestamptz, 'infinity')
order by id desc
limit 1
