insert into abreast.finding (endpoint_id, part, path, kind, impact, first_seen, last_seen, detail)
select endpoint_id, part, path, kind, impact, at, at, detail
from json_to_recordset(%(given)s::json) as given (
    endpoint_id integer, part text, path text, kind text, impact text, ms bigint, detail jsonb
), lateral (select timestamptz 'epoch' + ms * interval '1 ms') as moment (at)
order by endpoint_id, part, path, kind
on conflict do nothing
