select outcome, sum(pairs)::bigint as pairs,
       coalesce(sum(pairs) filter (
           where outcome = 'mismatch' and (findings <> '{}' or explained is not null)
             and not findings && array(
                 select f.id
                 from abreast.finding f
                 where f.endpoint_id = any(%(endpoints)s::integer[]) and abreast.open_regression(f)
             )
       ), 0)::bigint as explained,
       min(first) as first, max(last) as last
from abreast.sums(%(endpoints)s::integer[], %(start)s::timestamptz, %(end)s::timestamptz)
group by outcome
having sum(pairs) > 0
order by pairs desc, outcome
