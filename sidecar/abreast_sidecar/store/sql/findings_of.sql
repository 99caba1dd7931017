select finding.endpoint_id, finding.part, finding.path, finding.kind, finding.id,
       (select count(*) from abreast.finding_example where finding_id = finding.id) as examples
from abreast.finding
where finding.endpoint_id = any(%(endpoints)s)
