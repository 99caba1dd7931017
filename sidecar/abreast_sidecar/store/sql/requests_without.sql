-- The newest pairs of its endpoint that were compared and do not show a finding.
-- `between`: by an equal sign the planner may go through the pairs of all endpoints, back to an endpoint that is rare.
select p.request
from abreast.pair p
where p.endpoint_id between (select endpoint_id from abreast.finding where id = %(id)s)
                        and (select endpoint_id from abreast.finding where id = %(id)s)
  and p.outcome in ('match', 'mismatch', 'partial', 'oversize') and not p.findings @> array[%(id)s::bigint]
order by p.endpoint_id desc, p.at desc
limit %(limit)s
