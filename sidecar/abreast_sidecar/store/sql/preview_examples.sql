select fe.finding_id, x.captures
from abreast.finding f
cross join lateral (
    select * from abreast.finding_example where finding_id = f.id order by size, day, pair_id limit %(each)s
) as fe
join abreast.example x on x.day = fe.day and x.pair_id = fe.pair_id
where f.id = any(%(findings)s::bigint[])
order by f.count desc, f.id
limit %(limit)s
