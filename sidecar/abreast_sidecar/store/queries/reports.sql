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
       coalesce(d.dead_letters, 0) as dead_letters
from (
    select service from abreast.envoy_report
    union select service from abreast.outcome_count
    union select service from abreast.shard_report
    union select %(service)s::text where %(service)s::text is not null
) as s
left join lateral (
    select sum((totals->>'sampled')::bigint)::bigint as sampled, sum((totals->>'not_sent')::bigint)::bigint as not_sent
    from abreast.envoy_report where envoy_report.service = s.service
) as e on true
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
),
counted as (
    select service, key, sum(value::bigint)::bigint as count
    from reported
    where value ~ '^[0-9]{1,15}$' and (%(service)s::text is null or service = %(service)s)
    group by service, key
)
select service, case when key ~ '^(redis_)?rejected_' then 'redis' when key = 'day_dropped' then 'ledger'
       else 'service' end as stage,
       replace(key, 'redis_rejected_', 'rejected_') as reason, max(count) as count
from counted
where count > 0
group by 1, 2, 3
order by 1, 2, 3

-- name: dead_letter_reasons
-- Count the stored dead letters by reason, most frequent first.
select reason, count(*) as count, max(at) as last
from abreast.dead_letter
where service = %(service)s
group by reason
order by count(*) desc, reason
limit %(limit)s

-- name: summary_outcomes
select outcome, sum(pairs)::bigint as pairs,
       coalesce(sum(pairs) filter (
           where outcome = 'mismatch' and (findings <> '{}' or explained is not null)
             and not findings && array(
                 select f.id
                 from abreast.finding f
                 where f.endpoint_id = any(%(endpoints)s::integer[]) and abreast.is_open_regression(f)
             )
       ), 0)::bigint as explained,
       min(first) as first, max(last) as last
from abreast.pair_counts(%(endpoints)s::integer[], %(start)s::timestamptz, %(end)s::timestamptz)
group by outcome
having sum(pairs) > 0
order by pairs desc, outcome

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
-- Count each endpoint's pairs of a release in a window: pairs that name it, and pairs without an answer of new from its
-- period. Findings of detectors have no pairs.
-- Times come from the newest pairs, between baseline copies and new if there are enough copies.
-- Row comparisons keep the planner on pair_endpoint_at. With `=` it may scan the pairs of all endpoints; with two ranges
-- it expects few rows and sorts all.
with inside as materialized (
    select *
    from abreast.pair_counts(%(endpoints)s::integer[], %(start)s::timestamptz, %(end)s::timestamptz)
    where %(release)s::text is null or new_release = %(release)s
    union all
    select *
    from abreast.pair_counts(%(endpoints)s::integer[], %(lone_start)s::timestamptz, %(lone_end)s::timestamptz)
    where new_release <> %(release)s::text and new_status is null
),
-- Caches, pools and compilers start cold: the first pairs of each release are not `warm`.
release as materialized ( -- evaluate it once, not for each endpoint
    select endpoint_id, old_release, new_release,
           sum(pairs) - greatest(%(cold_pairs)s, ceil(sum(pairs) * %(cold_share)s::float8)) as warm
    from inside
    group by endpoint_id, old_release, new_release
),
shown as (
    select coalesce(array_agg(f.id) filter (where f.state = 'real' or f.status = 'confirmed'), '{}') as real,
           coalesce(array_agg(f.id) filter (where f.state = 'undecided' and f.status <> 'confirmed'), '{}') as undecided
    from abreast.finding f
    where f.endpoint_id = any(%(endpoints)s::integer[])
      and (abreast.is_open_regression(f)
           -- In a named release a fixed finding still counts, if that release shows it. Without names it only counts
           -- when it comes back.
           or (f.status = 'fixed' and f.impact <> 'additive' and f.state <> 'noise' and %(release)s::text <> ''))
),
counted as (
    select i.endpoint_id,
           min(i.first) filter (where i.new_status is not null) as first,
           max(i.last) filter (where i.new_status is not null) as last,
           coalesce(sum(i.pairs) filter (where i.old_status is not null), 0)::bigint as old_requests,
           coalesce(sum(i.pairs) filter (where i.new_status is not null), 0)::bigint as new_requests,
           coalesce(sum(i.pairs) filter (where classified.compared), 0)::bigint as compared,
           coalesce(sum(i.pairs) filter (where i.outcome = 'partial'), 0)::bigint as partial,
           coalesce(sum(i.pairs) filter (where classified.compared and classified.real), 0)::bigint as mismatches,
           coalesce(sum(i.pairs) filter (where classified.compared and classified.undecided and not classified.real), 0)::bigint
               as undecided,
           coalesce(sum(i.pairs) filter (where classified.compared and i.explained is not null and not classified.real), 0)::bigint
               as by_rules,
           coalesce(sum(i.pairs) filter (where classified.compared and classified.new_error
               and not classified.old_error), 0)::bigint
               as new_errors,
           coalesce(sum(i.pairs) filter (where classified.compared and classified.old_error
               and not classified.new_error), 0)::bigint
               as old_errors
    from inside i
    cross join lateral (
        select i.findings <> '{}' and i.findings && (select real from shown) as real,
               i.findings <> '{}' and i.findings && (select undecided from shown) as undecided
    ) as shows
    cross join lateral (
        -- Bodies above the limit have only a digest: if the digest is noise, nothing was compared.
        select i.outcome in ('match', 'mismatch', 'partial') or (i.outcome = 'oversize'
               and (shows.real or shows.undecided)) as compared,
               shows.real, shows.undecided,
               coalesce(i.old_status, 0) not between 1 and 499 as old_error,
               coalesce(i.new_status, 0) not between 1 and 499 as new_error
    ) as classified
    group by i.endpoint_id
    having sum(i.pairs) > 0
)
select e.method, e.route, c.old_requests, c.new_requests, c.compared, c.partial, c.mismatches, c.undecided, c.by_rules,
       c.new_errors, c.old_errors, times.timed, times.slower
from counted c
join abreast.endpoint e on e.id = c.endpoint_id
cross join lateral (
    select case when has_baseline then copies when abreast.expects_baseline(e, all_pairs) then 0 else all_pairs end
           as timed,
           case when has_baseline then slower_copies when abreast.expects_baseline(e, all_pairs) then 0 else slower end
               as slower
    from (
        select count(*) as all_pairs, count(baseline_us) as copies,
               count(baseline_us) >= %(least_copies)s as has_baseline,
               count(*) filter (where new_us - old_us > greatest(old_us * %(max_slower)s::float8, %(min_slower_us)s))
               as slower,
               count(*) filter (where new_us - baseline_us > greatest(baseline_us * %(max_slower)s::float8,
                   %(min_slower_us)s)) as slower_copies
        from (
            select latest.*, row_number() over (partition by old_release, new_release order by at desc, id desc) as newer
            from (
                select p.at, p.id, p.old_release, p.new_release, p.outcome, p.old_status, p.new_status, p.old_us,
                       p.new_us, p.baseline_us
                from abreast.pair p
                where (p.endpoint_id, p.at) >= (c.endpoint_id, c.first)
                    and (p.endpoint_id, p.at) <= (c.endpoint_id, c.last)
                order by p.endpoint_id desc, p.at desc, p.id desc
                limit %(newest)s
            ) as latest
            where %(release)s::text is null or new_release = %(release)s
        ) as newest
        join release r on r.endpoint_id = c.endpoint_id and r.old_release = newest.old_release
            and r.new_release = newest.new_release and newest.newer <= r.warm
        where newest.outcome in ('match', 'mismatch') and newest.old_status = newest.new_status
          and newest.old_us is not null and newest.new_us is not null
    ) as measured
) as times
order by e.route, e.method

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
       coalesce(sum(pairs) filter (where outcome = any(%(evidence)s)), 0)::bigint as accounted
from kept
