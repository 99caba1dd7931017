-- Whole hours are counted already; rows are only counted for what the window has of the hours at its two ends.
with chosen as (
    select id from abreast.endpoint where service = %(service)s
),
regression as (
    select f.id
    from abreast.finding f
    where f.endpoint_id in (select id from chosen) and abreast.open_regression(f)
),
counted as (
    select outcome, pairs, first, last
    from abreast.hour
    where endpoint_id in (select id from chosen)
      and (%(first_hour)s::timestamptz is null or hour >= %(first_hour)s)
      and (%(end_hour)s::timestamptz is null or hour < %(end_hour)s)
    union all
    select outcome, 1, at, at
    from abreast.pair
    where endpoint_id in (select id from chosen) and at >= %(start)s::timestamptz and at < %(head_end)s::timestamptz
    union all
    select outcome, 1, at, at
    from abreast.pair
    where endpoint_id in (select id from chosen) and at >= %(tail_start)s::timestamptz and at < %(end)s::timestamptz
)
select outcome, sum(pairs)::bigint as pairs,
       case outcome when 'mismatch' then (
           select count(*)
           from abreast.pair
           where outcome = 'mismatch'
             and (endpoint_id in (select id from chosen)) is true -- a filter: a join would read the index of all pairs
             and (findings <> '{}' or explained is not null) and not findings && array(select id from regression)
             and (%(start)s::timestamptz is null or at >= %(start)s)
             and (%(end)s::timestamptz is null or at < %(end)s)
       ) else 0 end as explained,
       min(first) as first, max(last) as last
from counted
group by outcome
order by pairs desc, outcome
