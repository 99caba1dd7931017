select shown.finding, p.old_release, p.new_release, p.old_status, p.new_status, count(*) as pairs
from abreast.pair p
cross join lateral unnest(p.findings) as shown (finding)
where p.findings <> '{}' and p.findings && %(findings)s::bigint[] and shown.finding = any(%(findings)s::bigint[])
group by 1, 2, 3, 4, 5
