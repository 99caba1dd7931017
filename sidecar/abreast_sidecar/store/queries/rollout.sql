-- name: guard_read
select service, policy, since, fired_at, state, message, checked_at, clock_timestamp() as now
from abreast.guard
where %(service)s::text is null or service = %(service)s
order by service

-- name: guard_lock
select service, policy, since, fired_at, state, message, checked_at, clock_timestamp() as now
from abreast.guard
where service = %(service)s
for update

-- name: guard_set
-- Set a policy. Earlier evidence and cool-down periods no longer count.
insert into abreast.guard (service, policy)
values (%(service)s, %(policy)s)
on conflict (service) do update set policy = excluded.policy, since = clock_timestamp(), fired_at = '{}',
    state = 'waiting', message = '', checked_at = null
returning service, policy, since, fired_at, state, message, checked_at, clock_timestamp() as now

-- name: guard_exposed_since
-- Return when users last got new after a time without any. Earlier evidence does not count.
select max(at) as exposed
from abreast.traffic_event
where service = %(service)s and (after->>'new_share')::integer > 0
  and coalesce((before->>'new_share')::integer, 0) = 0

-- name: guard_counts
-- Count each rule over two consecutive windows. `live`: user requests that new answered, or should have. `new_errors`
-- and `old_errors` are errors of one version only. Times count where waits match. A limit on the newest rows bounds the cost.
with chosen as (
    select id from abreast.endpoint where service = %(service)s
),
shown as (
    select coalesce(array_agg(f.id), '{}') as real
    from abreast.finding f
    where f.endpoint_id in (select id from chosen) and f.impact <> 'additive' and f.state = 'real'
),
newest as (
    select p.at, p.findings, p.old_us, p.new_us, p.outcome, p.old_status, p.new_status, p.failed_over,
           p.outcome in ('match', 'mismatch', 'partial', 'oversize') as compared,
           p.live = 'new' or p.failed_over as live, p.baseline_us, p.waits_match, p.baseline_waits_match
    from abreast.pair p
    where p.endpoint_id in (select id from chosen)
      and p.at >= (select min(start) from unnest(%(starts)s::timestamptz[]) as start)
      and p.at < %(now)s::timestamptz + interval '1 minute'
      and not ( -- a drill that is over is no reason for a rollback
          p.new_status is null and exists (
              select from abreast.drill_spans(%(service)s) as drill
              where p.at between drill.start and drill.stop and drill.stop < %(now)s::timestamptz
          )
      )
    order by p.at desc
    limit %(limit)s
),
threshold as (
    select array_agg(distinct start order by start) as starts from unnest(%(starts)s::timestamptz[]) as start
),
classified as (
    select width_bucket(n.at, (select starts from threshold)) as part, -- between two starts
           n.compared as compared,
           n.compared and n.findings <> '{}' and n.findings && (select real from shown) as mismatch,
           n.live and (n.compared or n.failed_over) as live,
           (n.failed_over or coalesce(n.new_status, 0) not between 1 and 499) as new_error,
           coalesce(n.old_status, 0) not between 1 and 499 as old_error,
           n.outcome in ('match', 'mismatch') and n.old_status = n.new_status and n.old_us is not null
               and n.new_us is not null as timed,
           n.new_us - n.old_us > greatest(n.old_us * %(slower)s::float8, %(min_slower_us)s) as slower,
           n.baseline_us is not null as copied, n.waits_match, n.baseline_waits_match,
           n.new_us - n.baseline_us > greatest(n.baseline_us * %(slower)s::float8, %(min_slower_us)s) as slower_copy
    from newest n
),
counted as (
    select part,
           count(*) filter (where live) as live,
           count(*) filter (where live and new_error and not old_error) as new_errors,
           count(*) filter (where live and old_error and not new_error) as old_errors,
           count(*) filter (where compared) as compared,
           count(*) filter (where mismatch) as mismatches,
           count(*) filter (where timed and waits_match) as timed,
           count(*) filter (where timed and waits_match and slower) as slower,
           count(*) filter (where timed and copied) as copies,
           count(*) filter (where timed and copied and baseline_waits_match) as timed_copies,
           count(*) filter (where timed and baseline_waits_match and slower_copy) as slower_copies
    from classified
    group by part
)
select w.number,
       coalesce(sum(c.live), 0)::bigint as live,
       coalesce(sum(c.new_errors), 0)::bigint as new_errors,
       coalesce(sum(c.old_errors), 0)::bigint as old_errors,
       coalesce(sum(c.compared), 0)::bigint as compared,
       coalesce(sum(c.mismatches), 0)::bigint as mismatches,
       coalesce(case when sum(c.copies) >= %(least_copies)s then sum(c.timed_copies) else sum(c.timed) end, 0)::bigint
       as timed,
       coalesce(case when sum(c.copies) >= %(least_copies)s then sum(c.slower_copies) else sum(c.slower) end, 0)::bigint
           as slower
from unnest(%(starts)s::timestamptz[]) with ordinality as w (start, number)
left join counted c on c.part >= width_bucket(w.start, (select starts from threshold))
group by w.number
order by w.number

-- name: guard_fire
update abreast.guard
set fired_at = fired_at || jsonb_build_object(%(rule)s::text, clock_timestamp()), state = 'breached',
    message = %(message)s,
    checked_at = clock_timestamp()
where service = %(service)s

-- name: guard_status_set
update abreast.guard set state = %(state)s, message = %(message)s, checked_at = clock_timestamp()
where service = %(service)s and since = %(since)s

-- name: ramps_active
select id, service, state, steps, step, step_seconds, min_pairs, budget, actor, reason, started_at, step_at, ended_at,
       version, started_gap, step_gap, verdict, message, checked_at, clock_timestamp() as now
from abreast.ramp
where state in ('progressing', 'paused')
order by service

-- name: ramp_last
select id, service, state, steps, step, step_seconds, min_pairs, budget, actor, reason, started_at, step_at, ended_at,
       version, started_gap, step_gap, verdict, message, checked_at, clock_timestamp() as now
from abreast.ramp
where service = %(service)s
order by id desc
limit 1

-- name: ramp_lock
-- Lock the active ramp. The caller has locked the service's traffic before.
select id, service, state, steps, step, step_seconds, min_pairs, budget, actor, reason, started_at, step_at, ended_at,
       version, started_gap, step_gap, verdict, message, checked_at, clock_timestamp() as now
from abreast.ramp
where service = %(service)s and state in ('progressing', 'paused')
for update

-- name: ramp_add
insert into abreast.ramp (service, state, steps, step_seconds, min_pairs, budget, actor, reason, started_at, step_at,
                          version, started_gap, step_gap)
values (%(service)s, 'progressing', %(steps)s, %(step_seconds)s, %(min_pairs)s, %(budget)s, %(actor)s, %(reason)s,
        clock_timestamp(), clock_timestamp(), %(version)s, %(gap)s, %(gap)s)
returning id, service, state, steps, step, step_seconds, min_pairs, budget, actor, reason, started_at, step_at, ended_at,
       version, started_gap, step_gap, verdict, message, checked_at, clock_timestamp() as now

-- name: ramp_update
update abreast.ramp
set state = %(state)s,
    step = %(step)s,
    version = %(version)s,
    message = %(message)s,
    verdict = coalesce(%(verdict)s, verdict),
    checked_at = case when %(verdict)s::text is null then checked_at else clock_timestamp() end,
    step_at = case when %(restart)s then clock_timestamp() else step_at end,
    step_gap = case when %(restart)s then %(gap)s else step_gap end,
    ended_at = case when %(state)s in ('progressing', 'paused') then null else clock_timestamp() end
where id = %(id)s
returning id, service, state, steps, step, step_seconds, min_pairs, budget, actor, reason, started_at, step_at, ended_at,
       version, started_gap, step_gap, verdict, message, checked_at, clock_timestamp() as now

-- name: ramp_status_set
update abreast.ramp set verdict = %(verdict)s, message = %(message)s, checked_at = clock_timestamp()
where id = %(id)s and state in ('progressing', 'paused')

-- name: ramp_gap_set
-- Set the gaps of a ramp that began without a count of Envoy. The step begins again.
update abreast.ramp r
set started_gap = coalesce(r.started_gap, g.gap), step_gap = g.gap, step_at = clock_timestamp()
from (
    select (select sum((totals->>'sampled')::bigint)::bigint from abreast.envoy_report where service = %(service)s)
         - (select coalesce(sum(pairs), 0)::bigint from abreast.outcome_count where service = %(service)s) as gap
) as g
where r.id = %(id)s and r.state in ('progressing', 'paused') and (r.started_gap is null or r.step_gap is null)
  and g.gap is not null

-- name: evidence_surplus
-- Return the pairs since `start`, Envoy's count for the same time, and the tolerance of their difference.
select (
           select coalesce(sum(pairs), 0)::bigint
           from abreast.pair_counts(
               array(select id from abreast.endpoint where service = %(service)s), %(start)s::timestamptz, null
           )
       ) as rows,
       abreast.envoy_sampled(%(service)s, %(start)s::timestamptz, null) as sampled,
       abreast.surplus_tolerance(%(service)s, %(start)s::timestamptz) as tolerance

-- name: ledger_gap
-- Return the requests that Envoy sampled (null if no count is known) and the pairs ever written.
select (select sum((totals->>'sampled')::bigint)::bigint from abreast.envoy_report where service = %(service)s)
       as sampled,
       (select coalesce(sum(pairs), 0)::bigint from abreast.outcome_count where service = %(service)s) as written
