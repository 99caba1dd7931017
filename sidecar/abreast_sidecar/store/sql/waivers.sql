-- Rules that waive the coverage of an endpoint, and hold.
select id, name, definition, owner, reason, expires
from abreast.rule
where ended is null and expires > now() and definition->>'action' = 'waive-coverage'
order by id
