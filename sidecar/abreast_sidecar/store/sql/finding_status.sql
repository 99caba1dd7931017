-- The row is locked already, so that what it is held against is what was committed last. No row: the release that is
-- named, or a later one, has shown the finding.
with found as (
    select f.id, f.status, e.service,
           (
               select id from abreast.release
               where service = e.service and version = 'new' and label = %(release)s and %(release)s <> ''
           ) as named,
           (
               select coalesce(max(id), 0) from abreast.release where service = e.service and version = 'new'
           ) as newest
    from abreast.finding f join abreast.endpoint e on e.id = f.endpoint_id
    where f.id = %(id)s
),
allowed as (
    select *
    from found
    where %(status)s <> 'fixed' or named is null
       or not exists (
           select from abreast.finding_release
           where finding_id = found.id and count > 0 and new_release >= named
       )
),
told as (
    insert into abreast.finding_event (finding_id, actor, before, after, release, reason)
    select id, %(actor)s, status, %(status)s, %(release)s, %(reason)s from allowed
)
update abreast.finding
set status = %(status)s, status_since = clock_timestamp(),
    fixed_after = case when %(status)s = 'fixed' then coalesce(allowed.named - 1, allowed.newest) end
from allowed
where finding.id = allowed.id
returning finding.id
