update abreast.ramp
set state = %(state)s,
    step = %(step)s,
    version = %(version)s,
    said = %(said)s,
    verdict = coalesce(%(verdict)s, verdict),
    looked_at = case when %(verdict)s::text is null then looked_at else clock_timestamp() end,
    step_at = case when %(restart)s then clock_timestamp() else step_at end,
    step_gap = case when %(restart)s then %(gap)s else step_gap end,
    ended_at = case when %(state)s in ('progressing', 'paused') then null else clock_timestamp() end
where id = %(id)s
returning id, service, state, steps, step, hold, min_pairs, budget, actor, reason, started_at, step_at, ended_at, version,
       started_gap, step_gap, verdict, said, looked_at, clock_timestamp() as now
