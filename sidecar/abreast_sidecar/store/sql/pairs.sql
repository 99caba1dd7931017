-- Of one day: what is of a partition the planner knows, and the newest are found without looking into older days.
select p.day, p.id, p.at, e.service, e.method, e.route, p.outcome, p.live, p.request, p.old_status, p.new_status,
       p.old_us, p.new_us, p.old_release, p.new_release, p.findings, p.reason, p.explained, p.explained_by, p.drift
from abreast.pair p
join abreast.endpoint e on e.id = p.endpoint_id
where p.day = %(day)s and p.endpoint_id = any(%(endpoints)s::integer[])
  and (%(outcomes)s::text[] is null or p.outcome = any(%(outcomes)s))
  and (%(finding_id)s::bigint = 0 or (p.findings <> '{}' and p.findings @> array[%(finding_id)s::bigint])
       or p.explained @> array[%(finding_id)s::bigint] or p.drift @> array[%(finding_id)s::bigint])
  and (%(start)s::timestamptz is null or p.at >= %(start)s)
  and (%(end)s::timestamptz is null or p.at < %(end)s)
  and (%(after_at)s::timestamptz is null or (p.at, p.id) < (%(after_at)s, %(after_id)s))
order by p.at desc, p.id desc
limit %(limit)s
