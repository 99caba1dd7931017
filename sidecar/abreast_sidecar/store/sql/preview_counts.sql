select shown.finding, s.old_release, s.new_release, s.old_status, s.new_status, sum(s.pairs)::bigint as pairs
from abreast.hour s
cross join lateral unnest(s.findings) as shown (finding)
where s.endpoint_id in (select endpoint_id from abreast.finding where id = any(%(findings)s::bigint[]))
  and s.findings && %(findings)s::bigint[] and shown.finding = any(%(findings)s::bigint[])
group by 1, 2, 3, 4, 5
having sum(s.pairs) > 0
