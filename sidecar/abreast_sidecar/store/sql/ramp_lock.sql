-- The ramp under way. Whoever locks it has locked the service's traffic before.
select id, service, state, steps, step, hold, min_pairs, budget, actor, reason, started_at, step_at, ended_at, version,
       started_gap, step_gap, verdict, said, looked_at, clock_timestamp() as now
from abreast.ramp
where service = %(service)s and state in ('progressing', 'paused')
for update
