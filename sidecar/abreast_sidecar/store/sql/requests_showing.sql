-- The newest pairs that show a finding.
select p.request
from abreast.pair p
where p.findings <> '{}' and p.findings @> array[%(id)s::bigint]
order by p.at desc
limit %(limit)s
