select finding.endpoint_id, finding.part, finding.path, finding.kind, finding.id, kept.examples, kept.largest,
       finding.replaced
from abreast.finding
cross join lateral (
    select count(*) as examples, coalesce(max(size), 0) as largest
    from abreast.finding_example
    where finding_id = finding.id
) as kept
where finding.endpoint_id = any(%(endpoints)s)
