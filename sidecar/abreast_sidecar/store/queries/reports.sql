-- name: process_reports_set
-- Store reports; `seen` is the time of the last change. Return reports without a change for a long time.
with input as (
    select id, report from json_to_recordset(%(rows)s::json) as input (id text, report jsonb)
), put as (
    insert into abreast.process_report (id, service, seen, report)
    select id, %(service)s, clock_timestamp(), report from input order by id
    on conflict (id) do update set service = excluded.service, seen = excluded.seen, report = excluded.report
    where process_report.report is distinct from excluded.report
)
select stored.id
from abreast.process_report as stored join input on input.id = stored.id
where stored.report = input.report and stored.seen < clock_timestamp() - %(stale)s * interval '1 second'

-- name: shard_report
select report from abreast.shard_report where service = %(service)s and shard = %(shard)s

-- name: shard_report_set
insert into abreast.shard_report (service, shard, seen, report)
values (%(service)s, %(shard)s, clock_timestamp(), %(report)s::jsonb)
on conflict (service, shard) do update set seen = excluded.seen, report = excluded.report

-- name: accounts
-- Return all-time counts of each service: sampled by Envoy, written to the ledger, and captures in Redis.
select s.service, e.sampled as envoy_sampled, coalesce(e.not_sent, 0) as not_sent, coalesce(t.written, 0) as written,
       coalesce(r.received, 0) as received, coalesce(r.duplicate, 0) as duplicate, coalesce(r.late, 0) as late,
       coalesce(r.joined, 0) as joined, coalesce(r.timed_out, 0) as timed_out,
       coalesce(d.dead_letters, 0) as dead_letters,
       greatest(coalesce(e.unseen, 0) - coalesce(u.known, 0), 0) as uncertain
from (
    select service from abreast.envoy_report
    union select service from abreast.outcome_count
    union select service from abreast.shard_report
    union select %(service)s::text where %(service)s::text is not null
) as s
left join lateral (
    select sum((totals->>'sampled')::bigint)::bigint as sampled, sum((totals->>'not_sent')::bigint)::bigint as not_sent,
           sum((totals->>'unseen')::bigint)::bigint as unseen
    from abreast.envoy_report where envoy_report.service = s.service
) as e on true
left join lateral ( -- captures that arrived after the last reading of their Envoy
    select sum(highest - counted)::bigint as known
    from abreast.envoy_stream where envoy_stream.service = s.service and highest > counted
) as u on true
left join lateral (
    select sum(pairs)::bigint as written from abreast.outcome_count where outcome_count.service = s.service
) as t on true
left join lateral (
    select sum((report->>'received')::bigint)::bigint as received,
           sum((report->>'duplicate')::bigint)::bigint as duplicate,
           sum((report->>'late')::bigint)::bigint as late,
           sum((report->>'joined')::bigint)::bigint as joined,
           sum((report->>'timed_out')::bigint)::bigint as timed_out
    from abreast.shard_report where shard_report.service = s.service
) as r on true
left join lateral (
    select count(*) as dead_letters from abreast.dead_letter where dead_letter.service = s.service
) as d on true
where %(service)s::text is null or s.service = %(service)s
order by s.service

-- name: drops
-- Return lost captures of all time. Redis and the sending process both count rejected captures. One may outlive the
-- other, so the larger count is shown.
with reported as (
    select r.service, d.key, d.value
    from abreast.process_report r
    cross join lateral jsonb_each_text(
        case jsonb_typeof(r.report->'dropped') when 'object' then r.report->'dropped' else '{}' end
    ) as d
    union all
    select service, 'late_effects', report->>'late_effects' from abreast.process_report
    union all
    select r.service, c.key, c.value
    from abreast.shard_report r cross join lateral jsonb_each_text(r.report) as c
    where c.key like 'rejected\_%%'
    union all
    select service, 'day_dropped', entries::text from abreast.late_entry
    union all
    select e.service, c.key, c.value
    from abreast.envoy_report e cross join lateral jsonb_each_text(e.totals) as c
    where c.key in ('captures_over_memory', 'captures_undelivered')
),
counted as (
    select service, key, sum(value::bigint)::bigint as count
    from reported
    where value ~ '^[0-9]{1,15}$' and (%(service)s::text is null or service = %(service)s)
    group by service, key
)
select service, case when key ~ '^(redis_)?rejected_' then 'redis' when key = 'day_dropped' then 'ledger'
       when key like 'captures\_%%' then 'envoy' else 'service' end as stage,
       replace(replace(key, 'redis_rejected_', 'rejected_'), 'captures_', '') as reason, max(count) as count
from counted
where count > 0
group by 1, 2, 3
order by 1, 2, 3

-- name: sheds
-- Return what Envoys did not copy, by reason: to protect a version or themselves, and what can't be copied.
select service, 'envoy' as stage, reason, sum(value::bigint)::bigint as count
from abreast.envoy_report
cross join lateral jsonb_each_text(totals)
cross join lateral (select case when key like 'rule.%%.not\_query' then 'not_query' else key end as reason) as named
where service = %(service)s
  and (reason like 'shed\_%%' or reason in ('logged_in', 'over_memory', 'too_large', 'not_query'))
group by service, reason
having sum(value::bigint) > 0
order by reason

-- name: unconverted
-- Return the captures of gRPC calls that collectors could not convert by descriptors, by reason.
select r.service, 'collector' as stage, d.key as reason, sum(d.value::bigint)::bigint as count
from abreast.process_report r
cross join lateral jsonb_each_text(
    case jsonb_typeof(r.report->'unconverted') when 'object' then r.report->'unconverted' else '{}' end
) as d
where r.service = %(service)s and d.value ~ '^[0-9]{1,15}$'
group by r.service, d.key
order by d.key

-- name: load_summary
-- Return the load that the newest pairs of the last hour met.
select count(*) as pairs, count(*) filter (where not waits_match) as unmatched,
       coalesce(percentile_cont(0.5) within group (order by old_in_flight), 0) as old_in_flight,
       coalesce(percentile_cont(0.5) within group (order by new_in_flight), 0) as new_in_flight
from (
    select waits_match, old_in_flight, new_in_flight
    from abreast.pair
    where endpoint_id = any(%(endpoints)s::integer[]) and at > clock_timestamp() - interval '1 hour'
    order by at desc
    limit 1000
) as newest
where waits_match is not null
having count(*) > 0

-- name: dead_letter_reasons
-- Count the stored dead letters by reason, most frequent first.
select reason, count(*) as count, max(at) as last
from abreast.dead_letter
where service = %(service)s
group by reason
order by count(*) desc, reason
limit %(limit)s

-- name: summary_outcomes
with regression as materialized (
    select f.id
    from abreast.finding f
    where f.endpoint_id = any(%(endpoints)s::integer[]) and abreast.is_open_regression(f)
)
select c.outcome, sum(c.pairs)::bigint as pairs,
       coalesce(sum(c.pairs) filter (
           where c.outcome = 'mismatch' and (c.findings <> '{}' or c.is_ruled) and not shows.regression
       ), 0)::bigint as explained,
       min(c.first) as first, max(c.last) as last
from ( -- hours have most lists of findings in common
    select outcome, findings, explained is not null as is_ruled, sum(pairs) as pairs, min(first) as first, max(last) as last
    from abreast.pair_counts(%(endpoints)s::integer[], %(start)s::timestamptz, %(end)s::timestamptz)
    group by outcome, findings, is_ruled
) c
cross join lateral ( -- In this place, `in` reads `regression` once into a hash table, not for each row.
    select coalesce(bool_or(id in (select regression.id from regression)), false) as regression
    from unnest(c.findings) as id
) as shows
group by c.outcome
having sum(c.pairs) > 0
order by pairs desc, c.outcome

-- name: summary_counts
select count(*) as findings
from abreast.finding f
where f.endpoint_id = any(%(endpoints)s::integer[]) and abreast.is_open_regression(f)
  and case when abreast.is_aggregate(f)
      then f.count > 0 and f.last_seen >= coalesce(%(start)s::timestamptz, '-infinity')
       and f.first_seen < coalesce(%(end)s::timestamptz, 'infinity')
      when %(windowed)s
      then f.id in (
          select unnest(findings)
          from abreast.pair_counts(%(endpoints)s::integer[], %(start)s::timestamptz, %(end)s::timestamptz)
          where findings <> '{}' and pairs > 0
      )
      else f.count > 0 end

-- name: verdict_counts
-- Count each endpoint's pairs of a release in a window: pairs that name it, and pairs without a label or a response of new
-- from its period. Findings of detectors have no pairs.
-- Return the times of the newest warm pairs as arrays, in order of arrival.
-- Row comparisons keep the planner on pair_endpoint_at. With `=` it may scan the pairs of all endpoints; with two ranges
-- it expects few rows and sorts all.
with inside as materialized ( -- the hours of a window have most lists of findings in common
    select endpoint_id, outcome, old_release, new_release, old_status, new_status, findings, explained is not null as is_ruled,
           sum(pairs)::bigint as pairs, min(first) as first, max(last) as last
    from (
        select *
        from abreast.pair_counts(%(endpoints)s::integer[], %(start)s::timestamptz, %(end)s::timestamptz)
        where %(release)s::text is null or new_release = %(release)s
        union all
        select *
        from abreast.pair_counts(%(endpoints)s::integer[], %(lone_start)s::timestamptz, %(lone_end)s::timestamptz)
        where new_release <> %(release)s::text and (new_status is null or new_release = '')
        union all -- without those of drills
        select c.endpoint_id, c.outcome, c.old_release, c.new_release, c.old_status, c.new_status, c.findings, c.explained,
               c.explained_by, c.drift, -c.pairs, c.first, c.last
        from abreast.drill_spans(%(service)s) as drill
        cross join lateral abreast.pair_counts(
            %(endpoints)s::integer[],
            greatest(drill.start, case when %(release)s::text is null then %(start)s else %(lone_start)s end::timestamptz),
            least(drill.stop, case when %(release)s::text is null then %(end)s else %(lone_end)s end::timestamptz)
        ) as c
        where c.new_status is null and (%(release)s::text is null or c.new_release <> %(release)s::text)
    ) as part
    group by endpoint_id, outcome, old_release, new_release, old_status, new_status, findings, is_ruled
),
-- A sampling rule of GraphQL queries excludes other requests, so that their pairs lack a copy. Their endpoints need no
-- coverage, if Envoy counted as many. Its count may lack 5%%, for example because it crashed.
excluded as materialized (
    select endpoint_id, old_requests
    from (
        select i.endpoint_id, sum(sum(i.pairs)) over () as total,
               coalesce(sum(i.pairs) filter (where i.old_status is not null), 0)::bigint as old_requests
        from inside i
        join abreast.endpoint e on e.id = i.endpoint_id and abreast.is_not_query(e)
        where i.outcome in ('only_old', 'only_new')
        group by i.endpoint_id
    ) as lone
    where total <= 1.05 * (
        select coalesce(sum(not_query), 0)
        from abreast.envoy_count
        where service = %(service)s
          and at >= coalesce(case when %(release)s::text is null then %(start)s else %(lone_start)s end::timestamptz, '-infinity')
                    - interval '25 seconds' -- pairs without a copy are joined later
          and at < coalesce(case when %(release)s::text is null then %(end)s else %(lone_end)s end::timestamptz, 'infinity')
    )
),
shown as materialized (
    select f.id, f.state = 'real' or f.status = 'confirmed' as is_real,
           f.state = 'undecided' and f.status <> 'confirmed' as is_undecided
    from abreast.finding f
    where f.endpoint_id = any(%(endpoints)s::integer[])
      and (abreast.is_open_regression(f)
           -- In a named release a fixed finding still counts, if that release shows it. Without names it only counts
           -- when it comes back.
           or (f.status = 'fixed' and f.impact <> 'additive' and f.state <> 'noise' and %(release)s::text <> ''))
),
release as (
    select i.endpoint_id, i.old_release, i.new_release, sum(i.pairs) as pairs,
           min(i.first) filter (where i.new_status is not null) as first,
           max(i.last) filter (where i.new_status is not null) as last,
           sum(i.pairs) filter (where i.old_status is not null) as old_requests,
           sum(i.pairs) filter (where i.new_status is not null) as new_requests,
           sum(i.pairs) filter (where classified.compared) as compared,
           sum(i.pairs) filter (where i.outcome = 'partial') as partial,
           sum(i.pairs) filter (where classified.compared and classified.real) as mismatches,
           sum(i.pairs) filter (where classified.compared and classified.undecided and not classified.real) as undecided,
           sum(i.pairs) filter (where classified.compared and i.is_ruled and not classified.real) as by_rules,
           sum(i.pairs) filter (where classified.compared and classified.new_error
               and not classified.old_error) as new_errors,
           sum(i.pairs) filter (where classified.compared and classified.old_error
               and not classified.new_error) as old_errors
    from inside i
    cross join lateral (
        -- In this place, `in` reads `shown` once into a hash table, not for each row.
        select coalesce(bool_or(id in (select shown.id from shown where shown.is_real)), false) as real,
               coalesce(bool_or(id in (select shown.id from shown where shown.is_undecided)), false) as undecided
        from unnest(i.findings) as id
    ) as shows
    cross join lateral (
        -- Bodies above the limit have only a digest: if the digest is noise, nothing was compared.
        select i.outcome in ('match', 'mismatch', 'partial') or (i.outcome = 'oversize'
               and (shows.real or shows.undecided)) as compared,
               shows.real, shows.undecided,
               abreast.is_error(i.old_status) as old_error,
               abreast.is_error(i.new_status) as new_error
    ) as classified
    group by i.endpoint_id, i.old_release, i.new_release
),
counted as (
    select endpoint_id, min(first) as first, max(last) as last,
           coalesce(sum(old_requests), 0)::bigint as old_requests, coalesce(sum(new_requests), 0)::bigint as new_requests,
           coalesce(sum(compared), 0)::bigint as compared, coalesce(sum(partial), 0)::bigint as partial,
           coalesce(sum(mismatches), 0)::bigint as mismatches, coalesce(sum(undecided), 0)::bigint as undecided,
           coalesce(sum(by_rules), 0)::bigint as by_rules, coalesce(sum(new_errors), 0)::bigint as new_errors,
           coalesce(sum(old_errors), 0)::bigint as old_errors,
           array_agg(old_release) as old_releases, array_agg(new_release) as new_releases,
           -- Caches, pools and compilers start cold: the first pairs of each release are not `warm`.
           array_agg(pairs - greatest(%(cold_pairs)s, ceil(pairs * %(cold_share)s::float8))) as warm
    from release
    group by endpoint_id
    having sum(pairs) > 0
)
select e.method, e.route, c.old_requests, c.new_requests, c.compared, c.partial, c.mismatches, c.undecided, c.by_rules,
       c.new_errors, c.old_errors, periods.new_error_periods, periods.old_error_periods, times.*, expected.expects_baseline,
       coalesce(excluded.old_requests, 0) as excluded
from counted c
join abreast.endpoint e on e.id = c.endpoint_id
left join excluded on excluded.endpoint_id = c.endpoint_id
cross join lateral (
    select count(*) filter (where balance > 0) as new_error_periods,
           count(*) filter (where balance < 0) as old_error_periods
    from (
        select sum(case when abreast.is_error(p.new_status) then 1 else -1 end) as balance
        from abreast.pair p
        where c.new_errors + c.old_errors > 0 and p.endpoint_id = e.id
          and p.outcome in ('match', 'mismatch', 'partial', 'oversize')
          and abreast.is_error(p.old_status) <> abreast.is_error(p.new_status)
          and abreast.is_of_release(
              p.new_release, p.at, %(release)s::text, %(lone_start)s::timestamptz, %(lone_end)s::timestamptz
          )
          and p.at >= coalesce(%(start)s::timestamptz, '-infinity') and p.at < coalesce(%(end)s::timestamptz, 'infinity')
        group by floor(extract(epoch from p.at) / 10)
    ) as period
) as periods
cross join lateral (
    select coalesce(array_agg(extract(epoch from at)::float8 order by at, id), '{}') as at,
           coalesce(array_agg(old_us order by at, id), '{}') as old_us,
           coalesce(array_agg(new_us order by at, id), '{}') as new_us,
           coalesce(array_agg(baseline_us order by at, id), '{}') as baseline_us,
           coalesce(array_agg(waits_match is true order by at, id), '{}') as waits_match,
           coalesce(array_agg(baseline_waits_match is true order by at, id), '{}') as baseline_waits_match
    from (
        select latest.*, row_number() over (partition by old_release, new_release order by at desc, id desc) as newer
        from (
            select p.at, p.id, p.old_release, p.new_release, p.outcome, p.old_status, p.new_status, p.old_us,
                   p.new_us, p.baseline_us, p.waits_match, p.baseline_waits_match
            from abreast.pair p
            where (p.endpoint_id, p.at) >= (c.endpoint_id, c.first)
                and (p.endpoint_id, p.at) <= (c.endpoint_id, c.last)
            order by p.endpoint_id desc, p.at desc, p.id desc
            limit %(newest)s
        ) as latest
        where %(release)s::text is null or new_release = %(release)s
    ) as newest
    join unnest(c.old_releases, c.new_releases, c.warm) as r (old_release, new_release, warm)
        on r.old_release = newest.old_release and r.new_release = newest.new_release and newest.newer <= r.warm
    where newest.outcome in ('match', 'mismatch') and newest.old_status = newest.new_status
      and newest.old_us is not null and newest.new_us is not null
) as times
cross join lateral abreast.expects_baseline(e.id, e.service, cardinality(times.at)) as expected
order by e.route, e.method

-- name: verdict_service_counts
-- Count the periods with errors of one version alone over all endpoints, and the users who left before a response began.
with error_period as (
    select sum(case when abreast.is_error(p.new_status) then 1 else -1 end) as balance
    from abreast.pair p
    where p.endpoint_id = any(%(endpoints)s::integer[])
      and p.outcome in ('match', 'mismatch', 'partial', 'oversize')
      and abreast.is_error(p.old_status) <> abreast.is_error(p.new_status)
      and abreast.is_of_release(
          p.new_release, p.at, %(release)s::text, %(lone_start)s::timestamptz, %(lone_end)s::timestamptz
      )
      and p.at >= coalesce(%(start)s::timestamptz, '-infinity') and p.at < coalesce(%(end)s::timestamptz, 'infinity')
    group by floor(extract(epoch from p.at) / 10)
),
departure as materialized (
    select p.id, p.live, p.at, p.left_by, floor(extract(epoch from p.at) / 10)::bigint as period
    from abreast.pair p
    where p.endpoint_id = any(%(endpoints)s::integer[]) and p.outcome = 'aborted' and p.left_by is not null
      and p.at >= coalesce(%(start)s::timestamptz, '-infinity') and p.at < coalesce(%(end)s::timestamptz, 'infinity')
      and abreast.is_of_release(
          case p.live when 'new' then p.new_release else '' end, p.at, %(release)s::text,
          %(lone_start)s::timestamptz, %(lone_end)s::timestamptz
      )
      and not exists (
          select from abreast.drill_spans(%(service)s) as drill where p.at between drill.start and drill.stop
      )
),
first_departure as materialized ( -- a user stays on one version, so all departures of a user are one event
    select distinct on (left_by) id, live, period from departure order by left_by, at, id
),
-- The share of new among live responses: by the newest 200 of five minutes, or by the settings of the last minute. The
-- greater one counts, so that a lag of either never counts against new.
period as materialized (
    select newest.period, greatest(observed.share, setting.share) as share
    from (select distinct period from first_departure order by period desc limit %(periods)s) as newest
    cross join lateral (
        select coalesce(avg((live = 'new')::integer), 0)::float8 as share
        from (
            select p.live
            from abreast.pair p
            where p.endpoint_id = any(%(endpoints)s::integer[]) and p.live is not null
              and p.at >= to_timestamp(newest.period * 10 - 290) and p.at < to_timestamp(newest.period * 10 + 10)
            order by p.at desc
            limit 200
        ) as recent
    ) as observed
    cross join lateral (
        select coalesce(max((after->>'new_share')::integer), 0) / 10000::float8 as share
        from (
            select at, after, lead(at, 1, 'infinity') over (order by id) as stop
            from abreast.traffic_event where service = %(service)s
        ) as event
        where at < to_timestamp(newest.period * 10 + 10) and stop >= to_timestamp(newest.period * 10 - 60)
    ) as setting
),
-- Drop users of the version with the greater share at random, so that both versions have equally many.
control as (
    select d.id, d.live, d.period
    from first_departure d join period using (period)
    where (hashtextextended(d.id, 1) & 2147483647) / 2147483648::float8
          < case d.live when 'new' then (1 - share) / nullif(share, 0) else share / greatest(1 - share, 1e-9) end
),
bet as ( -- an outage makes many users leave, so a period counts once
    select distinct on (period) live from control order by period, hashtextextended(id, 2)
),
measured as (
    select count(*) as departures, count(*) filter (where share > %(max_share)s) as alone
    from first_departure join period using (period)
    where live = 'new'
)
select (select count(*) from error_period where balance > 0) as new_error_periods,
       (select count(*) from error_period where balance < 0) as old_error_periods,
       (select count(*) from departure where live = 'new') as new_departures,
       (select count(*) from departure where live = 'old') as old_departures,
       (select count(*) from bet where live = 'new') as new_departure_periods,
       (select count(*) from bet where live = 'old') as old_departure_periods,
       (select avg(share) from period) as new_share,
       (select alone / nullif(departures, 0)::float8 from measured) as alone

-- name: verdict_noise
-- Return the places whose noise may hide regressions, with the counts of a release. Shapes of values explain fresh ids and
-- the like. Endpoints with few pairs share a place, as for the classification.
select min(e.method || ' ' || e.route) || case when count(*) > 1 then format(' and %%s similar ones', count(*) - 1) else '' end
       as endpoint,
       case when f.part = 'body' then f.path else f.part || ' ' || f.path end as location,
       sum(total.compared)::bigint as compared, sum(total.baseline_compared)::bigint as baseline_compared,
       sum(shown.differing)::bigint as differing, sum(shown.baseline_differing)::bigint as baseline_differing,
       sum(shown.other_only)::bigint as other_only, sum(shown.same_only)::bigint as same_only
from abreast.finding f
join abreast.endpoint e on e.id = f.endpoint_id
cross join lateral (
    select sum(r.count) as differing, sum(r.baseline_count) as baseline_differing, sum(r.other_only) as other_only,
           sum(r.same_only) as same_only, sum(r.shape_explained) as shape_explained
    from abreast.finding_release r
    left join abreast.release n on n.id = r.new_release
    where r.finding_id = f.id and r.rule_id = 0
      and (%(release)s::text is null or r.new_release = 0 or n.label = %(release)s)
) as shown
cross join lateral (
    select sum(c.compared) as compared, sum(c.baseline_compared) as baseline_compared
    from abreast.endpoint_release c
    left join abreast.release n on n.id = c.new_release
    where c.endpoint_id = e.id and (%(release)s::text is null or c.new_release = 0 or n.label = %(release)s)
) as total
where f.endpoint_id = any(%(endpoints)s::integer[]) and f.state = 'noise' and f.impact <> 'additive'
  and f.status not in ('confirmed', 'expected', 'fixed') and not abreast.is_aggregate(f)
  and shown.differing > shown.shape_explained and total.compared > 0
group by f.part, f.path, f.kind, case when e.compared >= %(few)s then e.id::text else abreast.get_pool(e) end

-- name: verdict_completeness
-- Compare Envoy's count with the pairs of the window, or with all pairs ever written.
with kept as (
    select outcome, pairs
    from abreast.pair_counts(%(endpoints)s::integer[], %(start)s::timestamptz, %(end)s::timestamptz)
    where %(windowed)s
    union all
    select outcome, pairs from abreast.outcome_count where not %(windowed)s and service = %(service)s
)
select (select sum((totals->>'sampled')::bigint)::bigint from abreast.envoy_report where service = %(service)s)
       as envoy_sampled,
       abreast.envoy_sampled(%(service)s, %(start)s::timestamptz, %(end)s::timestamptz) as sampled,
       (select coalesce(sum(pairs), 0)::bigint from abreast.outcome_count where service = %(service)s) as written,
       coalesce(sum(pairs), 0)::bigint as rows,
       coalesce(sum(pairs) filter (where outcome = any(%(evidence)s)), 0)::bigint as accounted,
       coalesce(sum(pairs) filter (where outcome = 'late'), 0)::bigint as late,
       least(
           coalesce(sum(pairs) filter (where outcome in ('only_old', 'only_new')), 0),
           (
               select coalesce(sum(shed + not_query), 0)
               from abreast.envoy_count
               where service = %(service)s and at >= coalesce(%(start)s::timestamptz, '-infinity') - interval '10 seconds'
                 and at < coalesce(%(end)s::timestamptz, 'infinity')
           )
       )::bigint as shed,
       abreast.surplus_tolerance(%(service)s, %(start)s::timestamptz) as tolerance
from kept
