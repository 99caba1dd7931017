-- A ramp that began before any Envoy's count was known: from now on requests are held against it, and the step begins anew.
update abreast.ramp r
set started_gap = coalesce(r.started_gap, g.gap), step_gap = g.gap, step_at = clock_timestamp()
from (
    select (select sum((counted->>'sampled')::bigint)::bigint from abreast.envoy_report where service = %(service)s)
         - (select coalesce(sum(pairs), 0)::bigint from abreast.tally where service = %(service)s) as gap
) as g
where r.id = %(id)s and r.state in ('progressing', 'paused') and (r.started_gap is null or r.step_gap is null)
  and g.gap is not null
