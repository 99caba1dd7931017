-- The pair, locked, with its findings and the ids of its releases.
select f.id, f.endpoint_id, f.part, f.path, f.kind, f.impact, old.id as old_release, new.id as new_release
from (select * from abreast.pair where id = %(pair)s and day = %(day)s::date and drift is null for update) as p
join abreast.endpoint e on e.id = p.endpoint_id
join abreast.finding f on f.id = any(p.findings)
join abreast.release old on old.service = e.service and old.version = 'old' and old.label = p.old_release
join abreast.release new on new.service = e.service and new.version = 'new' and new.label = p.new_release
