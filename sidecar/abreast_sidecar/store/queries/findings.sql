-- name: findings_add
insert into abreast.finding (endpoint_id, part, path, kind, impact, first_seen, last_seen, detail)
select endpoint_id, part, path, kind, impact, at, at, detail
from json_to_recordset(%(rows)s::json) as input (
    endpoint_id integer, part text, path text, kind text, impact text, ms bigint, detail jsonb
), lateral (select timestamptz 'epoch' + ms * interval '1 ms') as moment (at)
order by endpoint_id, part, path, kind
on conflict do nothing

-- name: finding_ids
select finding.endpoint_id, finding.part, finding.path, finding.kind, finding.id, existing.examples, existing.largest,
       finding.examples_replaced
from abreast.finding
cross join lateral (
    select count(*) as examples, coalesce(max(body_bytes), 0) as largest
    from abreast.finding_example
    where finding_id = finding.id
) as existing
where finding.endpoint_id = any(%(endpoints)s)

-- name: findings_lock
-- The fixed order prevents deadlocks between workers.
select from abreast.finding where id = any(%(ids)s) order by id for no key update

-- name: findings_count
select abreast.count_findings(%(rows)s::json)

-- name: findings_list
-- Counts are those at `as_of`, the time of the first page, so that all pages agree. All time: the counter without later
-- pairs. A window: its counts without later pairs.
with candidate as (
    select f.*, abreast.is_aggregate(f) as is_aggregate, e.service, e.method, e.route, e.compared as compared_ever,
           case when %(order_by)s <> '' then 0 when f.impact = 'breaking' then 0 when f.impact = 'value' then 1 else 2
           end as rank
    from abreast.finding f
    join abreast.endpoint e on e.id = f.endpoint_id
    where (%(ids)s::bigint[] is null or f.id = any(%(ids)s))
      and (%(cause_ids)s::bigint[] is null or f.id = any(%(cause_ids)s))
      and (%(service)s = '' or e.service = %(service)s)
      and (%(method)s = '' or e.method = %(method)s)
      and (%(route)s = '' or e.route = %(route)s)
      and (%(parts)s::text[] is null or f.part = any(%(parts)s))
      and (%(kinds)s::text[] is null or f.kind = any(%(kinds)s))
      and (%(impacts)s::text[] is null or f.impact = any(%(impacts)s))
      and (%(include_noise)s or %(only_explained)s or f.state <> 'noise' or f.status = 'confirmed'
           or f.count + f.baseline_count = 0) -- something else explains all of it
      and (%(include_settled)s or %(only_explained)s or f.status not in ('expected', 'fixed'))
),
-- `since` has the pairs after `as_of`; `inside` has the window without them.
since as materialized (
    select *
    from abreast.pair_counts(%(endpoints)s::integer[], %(since)s::timestamptz, %(end)s::timestamptz)
    where %(release)s = '' or new_release = %(release)s
),
inside as materialized (
    select endpoint_id, outcome, findings, explained, explained_by, drift, pairs
    from abreast.pair_counts(%(endpoints)s::integer[], %(start)s::timestamptz, %(end)s::timestamptz)
    where %(release)s = '' or new_release = %(release)s
    union all
    select endpoint_id, outcome, findings, explained, explained_by, drift, -pairs from since
),
showing as materialized (
    select shown.id, sum(s.pairs)::bigint as pairs
    from (
        select findings, pairs from inside where %(windowed)s
        union all
        select findings, pairs from since where not %(windowed)s
    ) as s
    cross join lateral unnest(s.findings) as shown (id)
    where s.findings <> '{}'
    group by shown.id
),
-- Findings that rules explain, and drift of state, are separate columns of a pair.
by_rule as materialized (
    select explaining.finding_id, explaining.rule_id, sum(explaining.pairs)::bigint as pairs
    from (
        select finding_id, rule_id, count as pairs
        from abreast.finding_release
        where not %(windowed)s and rule_id <> 0 and count > 0
        union all
        select shown.finding_id, shown.rule_id, s.pairs
        from inside s
        cross join lateral unnest(s.explained, s.explained_by) as shown (finding_id, rule_id)
        where s.explained is not null and %(windowed)s
    ) as explaining
    group by explaining.finding_id, explaining.rule_id
    having sum(explaining.pairs) > 0
),
drifted as materialized (
    select shown.id, sum(s.pairs)::bigint as pairs
    from inside s
    cross join lateral unnest(s.drift) as shown (id)
    where s.drift is not null and %(windowed)s
    group by shown.id
),
compared as materialized (
    select endpoint_id, sum(pairs)::bigint as pairs
    from inside
    where outcome in ('match', 'mismatch', 'partial', 'oversize')
    group by endpoint_id
),
compared_since as materialized (
    select endpoint_id, sum(pairs)::bigint as pairs
    from since
    where outcome in ('match', 'mismatch', 'partial', 'oversize')
    group by endpoint_id
),
measured as (
    select c.*,
           case
               when c.is_aggregate then case
                   when c.last_seen >= coalesce(%(start)s::timestamptz, '-infinity')
                    and c.first_seen < coalesce(%(end)s::timestamptz, 'infinity') then c.count
                   else 0 end
               when %(windowed)s then coalesce(s.pairs, 0)
               else c.count - coalesce(s.pairs, 0)
           end as shown_pairs,
           -- All time; retention may have dropped rows since.
           case when %(windowed)s then 0 else c.compared_ever - coalesce(e.pairs, 0) end as compared_total,
           exists (select from by_rule b where b.finding_id = c.id) as ruled,
           case when %(windowed)s then coalesce(d.pairs, 0) else c.drift_count end as drift_pairs,
           c.status in ('expected', 'fixed') or (c.state = 'noise' and c.status <> 'confirmed') as waived
    from candidate c
    left join drifted d on d.id = c.id
    left join showing s on s.id = c.id
    left join compared_since e on e.endpoint_id = c.endpoint_id
),
visible as materialized (
    select *,
           case %(order_by)s
               when 'first_seen desc' then (extract(epoch from first_seen) * 1000000)::bigint
               when 'last_seen desc' then (extract(epoch from last_seen) * 1000000)::bigint
               else shown_pairs
           end as weight
    from measured
    where (%(ids)s::bigint[] is not null
           or (shown_pairs > 0 and (waived or not %(only_explained)s))
           or ((ruled or drift_pairs > 0) and (%(include_settled)s or %(only_explained)s))
           or (not %(windowed)s and baseline_count > 0
               and (%(include_noise)s or %(only_explained)s) and (waived or not %(only_explained)s)))
),
page as (
    select *
    from visible
    where %(after_id)s::bigint is null or (rank, -weight, id) > (
        %(after_rank)s, -%(after_weight)s::bigint, %(after_id)s)
    order by rank, weight desc, id
    limit %(limit)s
)
select (select count(*) from visible) as total, p.weight, p.id, p.service, p.method, p.route, p.part, p.path, p.kind, p.impact, p.shown_pairs as count, p.rank,
       p.baseline_count, p.state, p.reason, p.drift_pairs, p.shape_explained, p.first_seen, p.last_seen, p.detail,
       p.status, greatest(coalesce(c.pairs, 0), p.compared_total) as compared, r.old_releases, r.new_releases,
       coalesce(
           (select reason from abreast.finding_event where finding_id = p.id order by id desc limit 1), ''
       ) as status_reason,
       (
           select jsonb_agg(
               jsonb_build_object('rule', r.id, 'name', r.name, 'owner', r.owner, 'reason', r.reason, 'pairs', b.pairs)
               order by b.pairs desc, r.id
           )
           from by_rule b join abreast.rule r on r.id = b.rule_id
           where b.finding_id = p.id
       ) as rules
from page p
left join compared c on c.endpoint_id = p.endpoint_id
cross join lateral (
    select array(
               select label from abreast.release
               where id in (
                   select old_release from abreast.finding_release
                   where finding_id = p.id and rule_id = 0 and count > 0
               )
               order by id desc
               limit %(most_releases)s
           ) as old_releases,
           array(
               select label from abreast.release
               where id in (
                   select new_release from abreast.finding_release
                   where finding_id = p.id and rule_id = 0 and count > 0
               )
               order by id desc
               limit %(most_releases)s
           ) as new_releases
) r
order by p.rank, p.weight desc, p.id

-- name: cause_members
-- Findings as causes group them. `companions`: findings that explain others, and that all examples show too.
-- `error_status`: the error status of both answers in all examples, else 0.
with shown as materialized (
    select shown.id, sum(c.pairs)::bigint as pairs
    from abreast.pair_counts(%(endpoints)s::integer[], %(start)s::timestamptz, %(end)s::timestamptz) c
    cross join lateral unnest(c.findings) as shown (id)
    where %(windowed)s and (%(release)s = '' or c.new_release = %(release)s)
    group by shown.id
),
candidate as materialized (
    select f.id, f.endpoint_id, e.service, e.method, e.route, f.part, f.path, f.kind, f.impact, f.state,
           f.detail ->> 'old' as old, f.detail ->> 'new' as new,
           f.status in ('expected', 'fixed') or (f.state = 'noise' and f.status <> 'confirmed') as is_explained,
           case
               when not %(windowed)s then f.count
               when not abreast.is_aggregate(f) then coalesce(s.pairs, 0)
               when f.last_seen >= coalesce(%(start)s::timestamptz, '-infinity')
                and f.first_seen < coalesce(%(end)s::timestamptz, 'infinity') then f.count
               else 0
           end as count
    from abreast.finding f
    join abreast.endpoint e on e.id = f.endpoint_id
    left join shown s on s.id = f.id
    where (%(service)s = '' or e.service = %(service)s)
      and (%(method)s = '' or e.method = %(method)s)
      and (%(route)s = '' or e.route = %(route)s)
      and (%(parts)s::text[] is null or f.part = any(%(parts)s))
      and (%(kinds)s::text[] is null or f.kind = any(%(kinds)s))
      and (%(impacts)s::text[] is null or f.impact = any(%(impacts)s))
      and (%(include_noise)s or f.state <> 'noise' or f.status = 'confirmed')
      and (%(include_settled)s or f.status not in ('expected', 'fixed'))
),
kept as materialized (
    select c.id, c.endpoint_id, p.findings, p.old_status, p.new_status
    from candidate c
    join abreast.finding_example x on x.finding_id = c.id
    join abreast.pair p on p.day = x.day and p.id = x.pair_id
    where c.count > 0
),
companion as (
    select id, array_agg(primary_id order by primary_id) as companions
    from (
        select k.id, f.id as primary_id
        from kept k
        join candidate f on f.endpoint_id = k.endpoint_id and f.id <> k.id and f.count > 0
        where f.part in ('status', 'error') or (f.part = 'body' and f.path in ('', '$'))
           or (f.part = 'header' and f.path = 'content-type')
        group by k.id, f.id
        having bool_and(f.id = any(k.findings))
    ) as always
    group by id
),
page as (
    select id, min(old_status) as status
    from kept
    group by id
    having min(old_status) = max(old_status) and min(new_status) = max(new_status) and min(old_status) = min(new_status)
       and min(old_status) >= 400
)
select c.id, c.service, c.method, c.route, c.part, c.path, c.kind, c.impact, c.count, c.state, c.is_explained, c.old,
       c.new, coalesce(page.status, 0) as error_status, coalesce(companion.companions, '{}') as companions
from candidate c
left join page on page.id = c.id
left join companion on companion.id = c.id
where c.count > 0

-- name: finding_examples
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
from abreast.finding_example fe
join abreast.example x on x.day = fe.day and x.pair_id = fe.pair_id
join abreast.pair p on p.day = fe.day and p.id = fe.pair_id
join abreast.endpoint e on e.id = p.endpoint_id
where fe.finding_id = %(id)s
order by fe.body_bytes, fe.day, fe.pair_id
limit %(limit)s

-- name: finding_events
select at, actor, before, after, release, reason
from abreast.finding_event
where finding_id = %(id)s
order by id desc
limit %(limit)s

-- name: finding_marks
-- Return the columns that change when a finding appears or grows.
select f.id, f.count, f.baseline_count, f.last_seen, f.state, f.status
from abreast.finding f join abreast.endpoint e on e.id = f.endpoint_id
where (%(service)s = '' or e.service = %(service)s) and (f.reason <> '' or f.state <> 'undecided')

-- name: finding_status_set
-- Set a status. The row is locked already, so this reads the last committed counters. No row is returned if the named
-- release or a later one has shown the finding.
with target as (
    select f.id, f.status, e.service,
           (
               select id from abreast.release
               where service = e.service and version = 'new' and label = %(release)s and %(release)s <> ''
           ) as named_release,
           (
               select coalesce(max(id), 0) from abreast.release where service = e.service and version = 'new'
           ) as newest_release
    from abreast.finding f join abreast.endpoint e on e.id = f.endpoint_id
    where f.id = %(id)s
),
allowed as (
    select *
    from target
    where %(status)s <> 'fixed' or named_release is null
       or not exists (
           select from abreast.finding_release
           where finding_id = target.id and rule_id = 0 and count > 0 and new_release >= named_release
       )
),
event as (
    insert into abreast.finding_event (finding_id, actor, before, after, release, reason)
    select id, %(actor)s, status, %(status)s, %(release)s, %(reason)s from allowed
)
update abreast.finding
set status = %(status)s, status_since = clock_timestamp(),
    fixed_after = case when %(status)s = 'fixed' then coalesce(allowed.named_release - 1, allowed.newest_release) end
from allowed
where finding.id = allowed.id
returning finding.id

-- name: findings_reopen
-- Reopen fixed findings of detectors if they hold in a later release.
with reopened as (
    select f.id, newest.label
    from abreast.finding f
    join abreast.endpoint e on e.id = f.endpoint_id
    cross join lateral (
        select id, label, first_seen
        from abreast.release
        where service = e.service and version = 'new'
        order by label = '', id desc
        limit 1
    ) as newest
    where f.status = 'fixed' and abreast.is_aggregate(f)
      and (
          (newest.id > f.fixed_after and f.last_seen > newest.first_seen)
          or (newest.label = '' and f.last_seen > f.status_since)
      )
    order by f.id
    for no key update of f
),
event as (
    insert into abreast.finding_event (finding_id, actor, before, after, release, reason)
    select id, 'abreast', 'fixed', 'reopened', label, 'seen again' from reopened
)
update abreast.finding
set status = 'reopened', status_since = clock_timestamp()
from reopened
where finding.id = reopened.id
