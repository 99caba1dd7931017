insert into abreast.ramp (service, state, steps, hold, min_pairs, budget, actor, reason, started_at, step_at, version,
                          started_gap, step_gap)
values (%(service)s, 'progressing', %(steps)s, %(hold)s, %(min_pairs)s, %(budget)s, %(actor)s, %(reason)s,
        clock_timestamp(), clock_timestamp(), %(version)s, %(gap)s, %(gap)s)
returning id, service, state, steps, step, hold, min_pairs, budget, actor, reason, started_at, step_at, ended_at, version,
       started_gap, step_gap, verdict, said, looked_at, clock_timestamp() as now
