with chosen as (
    select id from abreast.endpoint where service = %(service)s
),
regression as (
    select f.id
    from abreast.finding f
    where f.endpoint_id in (select id from chosen) and abreast.open_regression(f)
)
select outcome, count(*) as pairs,
       count(*) filter (
           where outcome = 'mismatch' and (findings <> '{}' or explained is not null) and not findings && array(select id from regression)
       ) as explained,
       min(at) as first, max(at) as last
from abreast.pair
where endpoint_id in (select id from chosen)
  and (%(start)s::timestamptz is null or at >= %(start)s)
  and (%(end)s::timestamptz is null or at < %(end)s)
group by outcome
order by pairs desc, outcome
