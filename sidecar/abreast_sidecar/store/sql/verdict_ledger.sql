-- What the ledger is held against: rows of the window, or of all time those ever written.
with kept as (
    select outcome, pairs
    from abreast.sums(%(endpoints)s::integer[], %(start)s::timestamptz, %(end)s::timestamptz)
    where %(windowed)s
    union all
    select outcome, pairs from abreast.tally where not %(windowed)s and service = %(service)s
)
select (select sum((counted->>'sampled')::bigint)::bigint from abreast.envoy_report where service = %(service)s) as envoy_sampled,
       abreast.envoy_sampled(%(service)s, %(start)s::timestamptz, %(end)s::timestamptz) as sampled,
       (select coalesce(sum(pairs), 0)::bigint from abreast.tally where service = %(service)s) as written,
       coalesce(sum(pairs), 0)::bigint as rows,
       coalesce(sum(pairs) filter (where outcome = any(%(evidence)s)), 0)::bigint as accounted
from kept
