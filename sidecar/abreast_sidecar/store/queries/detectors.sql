-- name: noise_due
-- Return the findings of endpoints with new counts; detectors decide about their own findings. Columns named `newest_*`
-- describe the latest release that shows the finding. Its baseline counts are those of the same release of old.
select e.id as endpoint, e.compared, e.baseline_compared, f.id, f.part, f.path, f.kind, f.count, f.baseline_count,
       f.shape_explained, f.new_greater, f.new_smaller, f.repeat_checks, f.old_repeats, f.new_repeats, f.magnitude_up,
       f.magnitude_down,
       f.baseline_magnitude_up, f.baseline_magnitude_down, f.state, f.reason,
       newest.old_release, newest.new_release, newest.label as newest_label, newest.compared as newest_compared,
       newest.count as newest_count, newest.shape_explained as newest_shape_explained,
       newest.new_greater as newest_new_greater,
       newest.new_smaller as newest_new_smaller, newest.repeat_checks as newest_repeat_checks,
       newest.old_repeats as newest_old_repeats,
       newest.new_repeats as newest_new_repeats, newest.magnitude_up as newest_magnitude_up,
       newest.magnitude_down as newest_magnitude_down,
       copies.baseline_magnitude_up as newest_baseline_magnitude_up,
       copies.baseline_magnitude_down as newest_baseline_magnitude_down,
       copies.baseline_count as newest_baseline_count, copies.baseline_compared as newest_baseline_compared
from abreast.endpoint e
left join abreast.finding f on f.endpoint_id = e.id and not abreast.is_aggregate(f)
left join lateral (
    select s.*, c.compared, r.label
    from abreast.finding_release s
    join abreast.endpoint_release c
        on c.endpoint_id = e.id and c.old_release = s.old_release and c.new_release = s.new_release
    left join abreast.release r on r.id = s.new_release
    where s.finding_id = f.id and s.count > 0
    order by s.new_release desc, s.old_release desc
    limit 1
) as newest on true
left join lateral (
    select shown.*,
           (
               select coalesce(sum(baseline_compared), 0)::bigint
               from abreast.endpoint_release
               where endpoint_id = e.id and old_release = newest.old_release
           ) as baseline_compared
    from (
        select coalesce(sum(baseline_count), 0)::bigint as baseline_count,
               coalesce(sum(baseline_magnitude_up), 0)::bigint as baseline_magnitude_up,
               coalesce(sum(baseline_magnitude_down), 0)::bigint as baseline_magnitude_down
        from abreast.finding_release
        where finding_id = f.id and old_release = newest.old_release
    ) as shown
) as copies on newest.old_release is not null
where (e.compared, e.baseline_compared) <> (e.classified_compared, e.classified_baseline)
order by e.id, f.id

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
select endpoint.id, timing.old_us, timing.new_us, timing.release, timing.baseline_us,
       abreast.expects_baseline(endpoint, cardinality(timing.old_us)) as expects_baseline
from abreast.endpoint
cross join lateral (
    select array_agg(old_us order by at, id) as old_us, array_agg(new_us order by at, id) as new_us,
           array_agg(release order by at, id) as release, array_agg(baseline_us order by at, id) as baseline_us
    from (
        select newest.*, release.id as number, max(release.id) over () as latest
        from (
            select at, id, outcome, old_status, new_status, old_us, new_us, old_release || ' ' || new_release as release,
                   new_release, baseline_us
            from abreast.pair
            where endpoint_id between endpoint.id and endpoint.id
              and at > (select clock_timestamp() - %(window)s * interval '1 second')
            order by endpoint_id desc, at desc
            limit %(limit)s
        ) as newest
        left join abreast.release
            on release.service = endpoint.service and release.version = 'new' and release.label = newest.new_release
        where outcome in ('match', 'mismatch') and old_status = new_status and old_us is not null and new_us is not null
    ) as recent
    where number is not distinct from latest
) as timing
where cardinality(timing.old_us) >= %(min_pairs)s

-- name: latency_finding_set
-- The detector decides the state.
insert into abreast.finding (endpoint_id, part, path, kind, impact, count, first_seen, last_seen, state, reason, detail)
values (%(endpoint)s, 'latency', '', 'slower', 'value', %(pairs)s, clock_timestamp(), clock_timestamp(), 'real',
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

-- name: cache_finding_set
-- The detector decides the state.
insert into abreast.finding (endpoint_id, part, path, kind, impact, count, first_seen, last_seen, state, reason, detail)
values (%(endpoint)s, 'cache', 'misses', 'changed', 'value', %(pairs)s, clock_timestamp(), clock_timestamp(), 'real',
        %(reason)s, %(detail)s::jsonb)
on conflict (endpoint_id, part, path, kind)
do update set count = excluded.count, last_seen = excluded.last_seen, reason = excluded.reason, detail = excluded.detail

-- name: missing_findings_set
-- Find endpoints where old has a capture and new has none, clearly more often than the reverse: new hangs there, or does
-- not capture. Only the last pairs since the latest release of new count.
-- `between` keeps the planner on pair_endpoint_at; with `=` it may scan the pairs of all endpoints.
insert into abreast.finding (endpoint_id, part, path, kind, impact, count, first_seen, last_seen, state, reason)
select endpoint.id, 'error', 'no capture', 'removed', 'breaking', recent.only_old, recent.first, recent.last, 'real',
       format('of the last %%s requests, %%s have no capture of new and %%s none of old', recent.pairs, recent.only_old,
           recent.only_new)
from abreast.endpoint
left join lateral (
    select first_seen
    from abreast.release r
    where service = endpoint.service and version = 'new'
      and exists (select from abreast.release f where f.service = r.service and f.version = 'new' and f.id < r.id)
    order by id desc
    limit 1
) as latest on true
cross join lateral (
    select count(*) as pairs,
           count(*) filter (where outcome = 'only_old') as only_old,
           count(*) filter (where outcome = 'only_new') as only_new,
           min(at) filter (where outcome = 'only_old') as first,
           max(at) filter (where outcome = 'only_old') as last
    from (
        select at, outcome
        from abreast.pair
        where endpoint_id between endpoint.id and endpoint.id
          and at > (select greatest(clock_timestamp() - %(window)s * interval '1 second', latest.first_seen))
        order by endpoint_id desc, at desc
        limit %(limit)s
    ) as newest
) as recent
where recent.only_old >= %(min_pairs)s and recent.only_old >= 3 * (recent.only_new + 1)
  and recent.only_old >= recent.pairs * %(share)s
on conflict (endpoint_id, part, path, kind)
do update set count = excluded.count, last_seen = excluded.last_seen, reason = excluded.reason
