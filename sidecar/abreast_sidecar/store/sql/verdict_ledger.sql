-- What the ledger is held against: rows of the window, or of all time those ever written.
with kept as (
    select p.outcome, count(*) as pairs
    from abreast.pair p
    where %(windowed)s and p.endpoint_id in (select id from abreast.endpoint where service = %(service)s)
      and (%(start)s::timestamptz is null or p.at >= %(start)s)
      and (%(end)s::timestamptz is null or p.at < %(end)s)
    group by p.outcome
    union all
    select outcome, sum(pairs)::bigint from abreast.tally where not %(windowed)s and service = %(service)s group by outcome
)
select (select sum((counted->>'sampled')::bigint)::bigint from abreast.envoy_report where service = %(service)s) as envoy_sampled,
       abreast.envoy_sampled(%(service)s, %(start)s::timestamptz, %(end)s::timestamptz) as sampled,
       (select coalesce(sum(pairs), 0)::bigint from abreast.tally where service = %(service)s) as written,
       coalesce(sum(pairs), 0)::bigint as rows,
       coalesce(sum(pairs) filter (where outcome = any(%(evidence)s)), 0)::bigint as accounted
from kept
