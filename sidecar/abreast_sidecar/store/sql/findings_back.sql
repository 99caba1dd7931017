-- Findings of no single pairs that were said to be fixed and hold in a later release: open again.
with found as (
    select f.id, newest.label
    from abreast.finding f
    join abreast.endpoint e on e.id = f.endpoint_id
    cross join lateral (
        select id, label, first_seen
        from abreast.release
        where service = e.service and version = 'new'
        order by id desc
        limit 1
    ) as newest
    where f.status = 'fixed' and abreast.of_no_pair(f)
      and (
          (newest.id > f.fixed_after and f.last_seen > newest.first_seen)
          or (newest.label = '' and f.last_seen > f.status_since)
      )
    order by f.id
    for no key update of f
),
told as (
    insert into abreast.finding_event (finding_id, actor, before, after, release, reason)
    select id, 'abreast', 'fixed', 'reopened', label, 'seen again' from found
)
update abreast.finding
set status = 'reopened', status_since = clock_timestamp()
from found
where finding.id = found.id
