select count(*) as findings
from abreast.finding f
where f.endpoint_id = any(%(endpoints)s::integer[]) and abreast.open_regression(f)
  and case when abreast.of_no_pair(f)
      then f.count > 0 and f.last_seen >= coalesce(%(start)s::timestamptz, '-infinity')
       and f.first_seen < coalesce(%(end)s::timestamptz, 'infinity')
      when %(windowed)s
      then f.id in (
          select unnest(findings)
          from abreast.sums(%(endpoints)s::integer[], %(start)s::timestamptz, %(end)s::timestamptz)
          where findings <> '{}' and pairs > 0
      )
      else f.count > 0 end
