-- name: day_open
select abreast.open_day(date '1970-01-01' + %(day)s) as open

-- name: days_open
-- Open today and tomorrow (UTC).
select abreast.open_day((clock_timestamp() at time zone 'UTC')::date + ahead) from generate_series(0, 1) as ahead

-- name: days
-- List the days with pairs, newest first.
select to_date(substring(child.relname from 'pair_([0-9]{8})$'), 'YYYYMMDD') as day
from pg_inherits
join pg_class as child on child.oid = pg_inherits.inhrelid
where pg_inherits.inhparent = 'abreast.pair'::regclass
order by day desc

-- name: pairs_add
select id, day from abreast.add_pairs(%(rows)s::json)

-- name: pairs_count
select abreast.count_pairs(%(outcomes)s::json, %(streams)s::json, %(endpoints)s::json, %(samples)s::json)

-- name: pairs_notify
select pg_notify('abreast_pairs', '')

-- name: bets_add
-- Write the keys of bets, and return the new ones. The fixed order prevents deadlocks between workers.
insert into abreast.bet (key)
select key from unnest(%(keys)s::bigint[]) as input (key) order by key
on conflict do nothing
returning key

-- name: pairs_set_late
-- Mark pairs whose missing capture arrived after the deadline. Return the service, the day and the former outcome of each.
with input as (
    select * from json_to_recordset(%(rows)s::json) as input (id text, service text, day integer, outcome text, reason text)
), stored as (
    select p.day, p.id, p.outcome, input.service, input.reason
    from abreast.pair p
    join input on p.id = input.id and p.outcome = input.outcome
        and p.day between date '1970-01-01' + input.day - 1 and date '1970-01-01' + input.day
    order by p.id
    for no key update of p
)
update abreast.pair p
set outcome = 'late', reason = stored.reason
from stored
where (p.day, p.id) = (stored.day, stored.id)
returning stored.service, p.day - date '1970-01-01', stored.outcome

-- name: late_entries_add
insert into abreast.late_entry as stored (service, entries)
select service, sum(entries)
from json_to_recordset(%(rows)s::json) as input (service text, day integer, entries bigint)
where date '1970-01-01' + day <= (select dropped_until from abreast.retention_state)
group by service
order by service
on conflict (service) do update set entries = stored.entries + excluded.entries

-- name: dead_letter_add
insert into abreast.dead_letter (at, service, entry, reason, content)
select timestamptz 'epoch' + %(ms)s * interval '1 ms', %(service)s, %(entry)s, %(reason)s, %(content)s
where (select count(*) from abreast.dead_letter where service = %(service)s) < %(limit)s
on conflict do nothing

-- name: outcome_counts
select service, outcome, sum(pairs)::bigint as pairs
from abreast.outcome_count
group by service, outcome
order by service, outcome

-- name: pairs_list
-- List pairs of one day: the planner reads one partition, and never looks for the newest pairs in older days.
select p.day, p.id, p.at, e.service, e.method, e.route, p.outcome, coalesce(p.live, '') as live, p.request,
       coalesce(p.old_status, 0) as old_status, coalesce(p.new_status, 0) as new_status, p.old_us, p.new_us, p.old_release, p.new_release, p.findings, p.reason, p.explained, p.explained_by, p.drift
from abreast.pair p
join abreast.endpoint e on e.id = p.endpoint_id
where p.day = %(day)s and p.endpoint_id = any(%(endpoints)s::integer[])
  and (%(outcomes)s::text[] is null or p.outcome = any(%(outcomes)s))
  and (%(finding_id)s::bigint = 0 or (p.findings <> '{}' and p.findings @> array[%(finding_id)s::bigint])
       or p.explained @> array[%(finding_id)s::bigint] or p.drift @> array[%(finding_id)s::bigint])
  and (%(start)s::timestamptz is null or p.at >= %(start)s)
  and (%(end)s::timestamptz is null or p.at < %(end)s)
  and (%(after_at)s::timestamptz is null or (p.at, p.id) < (%(after_at)s, %(after_id)s))
order by p.at desc, p.id desc
limit %(limit)s

-- name: pair_get
select p.day, p.id, p.at, e.service, e.method, e.route, p.outcome, coalesce(p.live, '') as live, p.request,
       coalesce(p.old_status, 0) as old_status, coalesce(p.new_status, 0) as new_status, p.old_us, p.new_us, p.old_release, p.new_release, p.findings, p.reason, p.explained, p.explained_by, p.drift,
       x.captures, x.differences,
       array(
           select n.part || ' ' || n.kind || ' ' || n.path
           from abreast.finding n
           where n.endpoint_id = p.endpoint_id and n.state = 'noise'
       ) as noisy,
       array(
           select n.part || ' ' || n.kind || ' ' || n.path from abreast.finding n where n.id = any(p.drift)
       ) as drifted
from abreast.pair p
join abreast.endpoint e on e.id = p.endpoint_id
left join abreast.example x on x.day = p.day and x.pair_id = p.id
where p.id = %(id)s
order by p.day desc
limit 1

-- name: pair_newest_age
-- Return the age in seconds of the newest compared pair; negative if this clock is behind. Pairs in the future by both
-- clocks don't count.
-- `between` keeps the planner on pair_endpoint_at; with `=` it may scan the pairs of all endpoints.
select extract(epoch from clock_timestamp() - max(newest.at))::float8 as age
from abreast.endpoint e
cross join lateral (
    select p.at from abreast.pair p
    where p.endpoint_id between e.id and e.id and p.outcome in ('match', 'mismatch', 'partial', 'oversize')
      and p.at < greatest(clock_timestamp(), %(sidecar_time)s) + interval '1 minute'
    order by p.endpoint_id desc, p.at desc limit 1
) as newest
where e.service = %(service)s

-- name: pair_times
-- Return times of the newest pairs of one endpoint with equal statuses, in order of arrival, and whether older pairs
-- exist.
-- `between` keeps the planner on pair_endpoint_at; with `=` it may scan the pairs of all endpoints.
with endpoint as (
    select id from abreast.endpoint where service = %(service)s and method = %(method)s and route = %(route)s
),
newest as materialized (
    select p.at, p.id, p.outcome, p.old_status, p.new_status, p.old_us, p.new_us,
           p.old_release || ' ' || p.new_release as release, p.baseline_us, p.waits_match is true as waits_match,
           p.baseline_waits_match is true as baseline_waits_match
    from abreast.pair p
    where p.endpoint_id between (select id from endpoint) and (select id from endpoint)
      and (%(start)s::timestamptz is null or p.at >= %(start)s)
      and (%(end)s::timestamptz is null or p.at < %(end)s)
    order by p.endpoint_id desc, p.at desc, p.id desc
    limit %(limit)s + 1
)
select old_us, new_us, release, baseline_us, waits_match, baseline_waits_match, (select count(*) > %(limit)s from newest) as more
from (select * from newest order by at desc, id desc limit %(limit)s) as taken
where outcome in ('match', 'mismatch') and old_status = new_status and old_us is not null and new_us is not null
order by at, id

-- name: requests_showing
-- Return requests of the newest pairs that show a finding.
select p.request
from abreast.pair p
where p.findings <> '{}' and p.findings @> array[%(id)s::bigint]
order by p.at desc
limit %(limit)s

-- name: requests_without
-- Return requests of the newest compared pairs of the same endpoint that don't show the finding.
-- `between` keeps the planner on pair_endpoint_at; with `=` it may scan the pairs of all endpoints.
select p.request
from abreast.pair p
where p.endpoint_id between (select endpoint_id from abreast.finding where id = %(id)s)
                        and (select endpoint_id from abreast.finding where id = %(id)s)
  and p.outcome in ('match', 'mismatch', 'partial', 'oversize') and not p.findings @> array[%(id)s::bigint]
order by p.endpoint_id desc, p.at desc
limit %(limit)s

-- name: recheck_needed
-- Check that the pair shows a finding that is not noise.
select exists (
    select from abreast.pair p join abreast.finding f on f.id = any(p.findings)
    where p.id = %(pair)s and p.day = %(day)s::date and f.state <> 'noise' and p.drift is null
) as needed

-- name: recheck_lock
-- Lock the pair, and return its findings with its release ids.
select f.id, f.endpoint_id, f.part, f.path, f.kind, f.impact, old.id as old_release, new.id as new_release,
       coalesce((p.marks ->> f.id::text)::integer, 0) as marks
from (select * from abreast.pair where id = %(pair)s and day = %(day)s::date and drift is null for update) as p
join abreast.endpoint e on e.id = p.endpoint_id
join abreast.finding f on f.id = any(p.findings)
join abreast.release old on old.service = e.service and old.version = 'old' and old.label = p.old_release
join abreast.release new on new.service = e.service and new.version = 'new' and new.label = p.new_release

-- name: recheck_set
update abreast.pair
set drift = %(ids)s, reason = %(reason)s,
    findings = array(select id from unnest(findings) with ordinality as f (id, number)
                     where id <> all(%(ids)s) order by number)
where id = %(pair)s and day = %(day)s::date

-- name: retest_findings
-- Return the undecided findings of the pair, unless a version has a later release.
select f.id, f.endpoint_id, f.part, f.path, f.kind, f.impact, old.id as old_release, new.id as new_release,
       abreast.get_pool(e) as pool, e.compared,
       exists (select from abreast.endpoint w where w.service = e.service and not abreast.is_safe(w.method)) as copies_writes
from abreast.pair p
join abreast.endpoint e on e.id = p.endpoint_id
join abreast.finding f on f.id = any(p.findings)
join abreast.release old on old.service = e.service and old.version = 'old' and old.label = p.old_release
join abreast.release new on new.service = e.service and new.version = 'new' and new.label = p.new_release
where p.id = %(pair)s and p.day = %(day)s::date
  and f.state = 'undecided' and f.part in ('status', 'header', 'body')
  and not exists (
      select from abreast.release r
      where r.service = e.service and (r.version = 'old' and r.id > old.id or r.version = 'new' and r.id > new.id)
  )
