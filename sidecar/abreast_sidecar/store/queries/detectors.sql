-- name: noise_due
-- Return the findings of endpoints with new counts; detectors decide about their own findings. Columns named `newest_*`
-- describe the latest release that shows the finding, `release_number` is its number among the releases of new, and
-- `places` counts all findings of the service.
-- All endpoints of a pool are due together.
with pooled as materialized (
    select e.*, case when e.compared >= %(few)s then e.id::text else abreast.get_pool(e) end as pool
    from abreast.endpoint e
),
due as materialized (
    select distinct pool from pooled where (compared, baseline_compared) <> (classified_compared, classified_baseline)
),
service as materialized (
    select owner.service, count(*) as places
    from abreast.finding f
    join abreast.endpoint owner on owner.id = f.endpoint_id
    where not abreast.is_aggregate(f)
    group by owner.service
)
select e.pool, e.id as endpoint, e.compared, e.baseline_compared, f.id, f.part, f.path, f.kind, f.count, f.baseline_count,
       f.shape_explained, f.copy_greater_of_new, f.copy_smaller_of_new, f.copy_greater_of_old, f.copy_smaller_of_old,
       f.other_only, f.same_only, f.repeat_checks, f.old_repeats, f.new_repeats, f.other_above, f.other_below,
       f.same_above, f.same_below, f.same_rises, f.same_falls, f.state, f.reason,
       newest.old_release, newest.new_release, newest.label as newest_label, newest.number as release_number,
       newest.compared as newest_compared, newest.baseline_compared as newest_baseline_compared,
       newest.count as newest_count, newest.baseline_count as newest_baseline_count,
       newest.shape_explained as newest_shape_explained, newest.copy_greater_of_new as newest_copy_greater_of_new,
       newest.copy_smaller_of_new as newest_copy_smaller_of_new,
       newest.copy_greater_of_old as newest_copy_greater_of_old,
       newest.copy_smaller_of_old as newest_copy_smaller_of_old, newest.other_only as newest_other_only,
       newest.same_only as newest_same_only, newest.repeat_checks as newest_repeat_checks,
       newest.old_repeats as newest_old_repeats, newest.new_repeats as newest_new_repeats,
       newest.other_above as newest_other_above, newest.other_below as newest_other_below,
       newest.same_above as newest_same_above,
       newest.same_below as newest_same_below, newest.same_rises as newest_same_rises,
       newest.same_falls as newest_same_falls, service.places
from pooled e
join due on due.pool = e.pool
left join abreast.finding f on f.endpoint_id = e.id and not abreast.is_aggregate(f)
left join lateral (
    select s.*, c.compared, c.baseline_compared, r.label,
           (
               select count(*) from abreast.release earlier
               where earlier.service = e.service and earlier.version = 'new' and earlier.id <= s.new_release
           ) as number
    from abreast.finding_release s
    join abreast.endpoint_release c
        on c.endpoint_id = e.id and c.old_release = s.old_release and c.new_release = s.new_release
    left join abreast.release r on r.id = s.new_release
    where s.finding_id = f.id and s.rule_id = 0 and s.count > 0
    order by coalesce(r.label, '') = '', s.new_release desc, s.old_release desc
    limit 1
) as newest on true
left join service on service.service = e.service
order by e.pool, e.id, f.id

-- name: findings_after_writes
-- Return pairs of the same endpoint and release before and after the first pair that shows a finding, for each of the
-- findings that had a pair of an unsafe request before it.
-- `between` keeps the planner on pair_endpoint_at; with `=` it may scan the pairs of all endpoints.
select f.id, earlier.pairs as earlier, later.pairs as later, later.showing
from abreast.finding f
join abreast.endpoint e on e.id = f.endpoint_id and abreast.is_safe(e.method)
    and exists (select from abreast.endpoint w where w.service = e.service and not abreast.is_safe(w.method))
cross join lateral (
    select p.at, p.new_release from abreast.pair p
    where p.endpoint_id between e.id and e.id and p.at >= f.first_seen and p.findings @> array[f.id]
    order by p.endpoint_id, p.at
    limit 1
) as first
cross join lateral (
    select count(*) as pairs from (
        select from abreast.pair p
        where p.endpoint_id between e.id and e.id and p.at < first.at and p.new_release = first.new_release
          and p.outcome in ('match', 'mismatch')
        order by p.endpoint_id desc, p.at desc
        limit %(limit)s
    ) as before
) as earlier
cross join lateral (
    select count(*) as pairs, count(*) filter (where showing) as showing from (
        select p.findings @> array[f.id] as showing from abreast.pair p
        where p.endpoint_id between e.id and e.id and p.at >= first.at and p.outcome in ('match', 'mismatch')
        order by p.endpoint_id, p.at
        limit %(limit)s
    ) as after
) as later
where f.id = any(%(ids)s) and earlier.pairs > 0
  and exists (
      select from abreast.endpoint w
      cross join lateral (
          select from abreast.pair p
          where p.endpoint_id between w.id and w.id and p.at < first.at and p.outcome in ('match', 'mismatch')
          limit 1
      ) as written
      where w.service = e.service and not abreast.is_safe(w.method)
  )

-- name: noise_set
update abreast.finding
set state = input.state, reason = input.reason
from json_to_recordset(%(rows)s::json) as input (id bigint, state text, reason text)
where finding.id = input.id

-- name: noise_done
update abreast.endpoint
set classified_compared = input.compared, classified_baseline = input.baseline_compared
from json_to_recordset(%(rows)s::json) as input (id integer, compared bigint, baseline_compared bigint)
where endpoint.id = input.id

-- name: noise_reset
-- Classify the findings of these endpoints again.
update abreast.endpoint set classified_compared = -1 where id = any(%(ids)s)

-- name: endpoint_times
-- Return times of the last pairs of each endpoint with equal statuses, in order of arrival. Only pairs of the latest
-- release of new count.
-- `between` keeps the planner on pair_endpoint_at; with `=` it may scan the pairs of all endpoints.
select endpoint.id, timing.old_us, timing.new_us, timing.release, timing.baseline_us, timing.waits_match,
       timing.baseline_waits_match,
       expected.expects_baseline
from abreast.endpoint
cross join lateral (
    select array_agg(old_us order by at, id) as old_us, array_agg(new_us order by at, id) as new_us,
           array_agg(release order by at, id) as release, array_agg(baseline_us order by at, id) as baseline_us,
           array_agg(waits_match is true order by at, id) as waits_match,
           array_agg(baseline_waits_match is true order by at, id) as baseline_waits_match
    from (
        select newest.*, release.id as number, max(release.id) over () as latest
        from (
            select at, id, outcome, old_status, new_status, old_us, new_us, old_release || ' ' || new_release as release,
                   new_release, baseline_us, waits_match, baseline_waits_match
            from abreast.pair
            where endpoint_id between endpoint.id and endpoint.id
              and at > (select clock_timestamp() - %(window)s * interval '1 second')
            order by endpoint_id desc, at desc
            limit %(limit)s
        ) as newest
        left join abreast.release
            on release.service = endpoint.service and release.version = 'new' and release.label = newest.new_release
           and release.label <> ''
        where outcome in ('match', 'mismatch') and old_status = new_status and old_us is not null and new_us is not null
    ) as recent
    where number is not distinct from latest
) as timing
cross join lateral abreast.expects_baseline(
    endpoint.id, endpoint.service, cardinality(timing.old_us)
) as expected
where cardinality(timing.old_us) >= %(min_pairs)s

-- name: detector_finding_set
-- The detector decides the state.
insert into abreast.finding (endpoint_id, part, path, kind, impact, count, first_seen, last_seen, state, reason, detail)
values (%(endpoint)s, %(part)s, %(path)s, %(kind)s, 'value', %(pairs)s, clock_timestamp(), clock_timestamp(), 'real',
        %(reason)s, %(detail)s::jsonb)
on conflict (endpoint_id, part, path, kind)
do update set count = excluded.count, last_seen = excluded.last_seen, reason = excluded.reason, detail = excluded.detail

-- name: endpoint_cache_counts
-- Return cache counts of the last pairs of each endpoint, if both versions sent them, in order of arrival.
-- `between` keeps the planner on pair_endpoint_at; with `=` it may scan the pairs of all endpoints.
select endpoint.id, counted.*
from abreast.endpoint
cross join lateral (
    select array_agg(old_hits order by at, id) as old_hits, array_agg(old_misses order by at, id) as old_misses,
           array_agg(new_hits order by at, id) as new_hits, array_agg(new_misses order by at, id) as new_misses,
           array_agg(release order by at, id) as release
    from (
        select newest.*
        from (
            select at, id, outcome, old_hits, old_misses, new_hits, new_misses,
                   old_release || ' ' || new_release as release
            from abreast.pair
            where endpoint_id between endpoint.id and endpoint.id
              and at > (select clock_timestamp() - %(window)s * interval '1 second')
            order by endpoint_id desc, at desc
            limit %(limit)s
        ) as newest
        where outcome in ('match', 'mismatch') and old_hits is not null and new_hits is not null
    ) as recent
) as counted
where cardinality(counted.old_hits) >= %(min_pairs)s

-- name: missing_findings_set
-- Find endpoints where old has a capture and new has none, clearly more often than the reverse. Only the last pairs
-- since the latest release of new count. Copies that Envoy did not send, for example because the client left before the
-- response, explain as many missing captures, except for those of aborted pairs. Requests that a rule of queries
-- excludes explain only those of endpoints that are no queries, or any POST if the ledger can't tell queries apart. A
-- finding is real if Envoy's count confirms that new did not answer as many copies. Otherwise it is undecided: new
-- answered, and its captures are late or lost. A request that failed over has no copy, and new did not answer it
-- either.
-- `between` keeps the planner on pair_endpoint_at; with `=` it may scan the pairs of all endpoints.
insert into abreast.finding (endpoint_id, part, path, kind, impact, count, first_seen, last_seen, state, reason)
select endpoint.id, 'error', 'no capture', 'removed', 'breaking', recent.only_old, recent.first, recent.last,
       case when confirmed.is_real then 'real' else 'undecided' end,
       format('of the last %%s requests, %%s have no capture of new and %%s none of old', recent.pairs, recent.only_old,
           recent.only_new)
       || case when confirmed.is_real then '; new did not answer'
          else '; Envoy counts answers of new, so its captures are late or lost: see abreast doctor' end
from abreast.endpoint
left join lateral (
    select first_seen
    from abreast.release r
    where service = endpoint.service and version = 'new' and label <> ''
      and exists (select from abreast.release f where f.service = r.service and f.version = 'new' and f.id < r.id)
    order by id desc
    limit 1
) as latest on true
cross join lateral (
    select count(*) as pairs,
           count(*) filter (where outcome = 'only_old') as only_old,
           count(*) filter (where outcome = 'only_old' and failed_over) as failed_over,
           count(*) filter (where outcome = 'only_new') as only_new,
           count(*) filter (where outcome = 'aborted') as aborted,
           min(at) as oldest,
           min(at) filter (where outcome = 'only_old') as first,
           max(at) filter (where outcome = 'only_old') as last
    from (
        select at, outcome, failed_over
        from abreast.pair
        where endpoint_id between endpoint.id and endpoint.id
          and at > (select greatest(clock_timestamp() - %(window)s * interval '1 second', latest.first_seen))
          and not (
              new_status is null
              and exists (select from abreast.drill_spans(endpoint.service) where at between start and stop)
          )
        order by endpoint_id desc, at desc
        limit %(limit)s
    ) as newest
) as recent
cross join lateral (
    select abreast.is_not_query(endpoint) or (endpoint.method = 'POST' and not exists (
               select from abreast.endpoint g where g.service = endpoint.service and g.source = 'graphql'
           )) as excluded
) as can_be
cross join lateral (
    select recent.only_old - greatest(coalesce(sum(without_copy - not_query), 0) - recent.aborted, 0)
               - case when can_be.excluded then coalesce(sum(not_query), 0) else 0 end as only_old,
           coalesce(sum(unanswered), 0) as unanswered
    from abreast.envoy_count
    where envoy_count.service = endpoint.service and envoy_count.at > recent.oldest - %(lag)s * interval '1 second'
) as unexplained
cross join lateral (
    select coalesce(sum((last_reading->>'in_flight')::bigint), 0) as in_flight
    from abreast.envoy_report where envoy_report.service = endpoint.service
) as present
cross join lateral (
    select least(unexplained.only_old, recent.failed_over + greatest(unexplained.unanswered - present.in_flight, 0))
           >= greatest(%(min_pairs)s, recent.pairs * %(share)s) as is_real
) as confirmed
where unexplained.only_old >= %(min_pairs)s and unexplained.only_old >= 3 * (recent.only_new + 1)
  and unexplained.only_old >= recent.pairs * %(share)s
on conflict (endpoint_id, part, path, kind)
do update set count = excluded.count, last_seen = excluded.last_seen, reason = excluded.reason,
    state = case when finding.state = 'real' then 'real' else excluded.state end
