-- The newest pairs of its endpoint that were compared and do not show a finding.
select p.request
from abreast.pair p
where p.endpoint_id = (select endpoint_id from abreast.finding where id = %(id)s)
  and p.outcome in ('match', 'mismatch', 'partial', 'oversize') and not p.findings @> array[%(id)s::bigint]
order by p.at desc
limit %(limit)s
