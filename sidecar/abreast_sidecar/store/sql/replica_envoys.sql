-- Of all sidecars but one.
select replica.sidecar, envoy.*
from abreast.replica
cross join jsonb_to_recordset(replica.envoys) as envoy (
    service text,
    node text,
    peer text,
    number bigint,
    acknowledged_at timestamptz,
    acknowledged_version bigint,
    answered_at timestamptz,
    answered_version bigint,
    after float8,
    error text
)
where replica.id <> %(id)s and abreast.is_alive(replica.seen, %(expires)s) and envoy.service = %(service)s
