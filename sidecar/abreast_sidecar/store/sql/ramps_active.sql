select id, service, state, steps, step, hold, min_pairs, budget, actor, reason, started_at, step_at, ended_at, version,
       started_gap, step_gap, verdict, said, looked_at, clock_timestamp() as now
from abreast.ramp
where state in ('progressing', 'paused')
order by service
