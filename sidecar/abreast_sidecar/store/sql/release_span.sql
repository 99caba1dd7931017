-- From when until when a pair without an answer of new belongs to the release: it names none, so that it is of the latest
-- that had come.
select case when exists (
           select from abreast.release f where f.service = r.service and f.version = 'new' and f.id < r.id
       ) then first_seen end as start,
       (
           select min(first_seen) from abreast.release f
           where f.service = r.service and f.version = 'new' and f.id > r.id
       ) as over
from abreast.release r
where service = %(service)s and version = 'new' and label = %(release)s::text
