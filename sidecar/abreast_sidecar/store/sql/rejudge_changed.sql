-- Rules that began or ended after a version; those that did both are no matter.
select id, definition, ended
from abreast.rule
where (began > %(after)s and ended is null) or (ended > %(after)s and began <= %(after)s)
order by id
