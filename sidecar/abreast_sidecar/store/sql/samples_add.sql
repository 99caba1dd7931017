insert into abreast.request_sample (endpoint_id, finding_id, slot, at, findings, features)
select endpoint_id, finding_id, slot, timestamptz 'epoch' + ms * interval '1 ms', findings, features
from json_to_recordset(%(given)s::json) as given (
    endpoint_id integer, finding_id bigint, slot smallint, ms bigint, findings bigint[], features jsonb
)
order by endpoint_id, finding_id, slot
on conflict (endpoint_id, finding_id, slot)
do update set at = excluded.at, findings = excluded.findings, features = excluded.features
