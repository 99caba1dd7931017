-- `seen` is when a report last changed. Returns those that have not for long.
with given as (
    select id, report from json_to_recordset(%(given)s::json) as given (id text, report jsonb)
), put as (
    insert into abreast.process_report (id, service, seen, report)
    select id, %(service)s, clock_timestamp(), report from given order by id
    on conflict (id) do update set service = excluded.service, seen = excluded.seen, report = excluded.report
    where process_report.report is distinct from excluded.report
)
select stored.id
from abreast.process_report as stored join given on given.id = stored.id
where stored.report = given.report and stored.seen < clock_timestamp() - %(stale)s * interval '1 second'
