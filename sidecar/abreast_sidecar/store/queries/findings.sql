-- name: findings_add
insert into abreast.finding (endpoint_id, part, path, kind, impact, first_seen, last_seen, detail)
select endpoint_id, part, path, kind, impact, at, at, detail
from json_to_recordset(%(given)s::json) as given (
    endpoint_id integer, part text, path text, kind text, impact text, ms bigint, detail jsonb
), lateral (select timestamptz 'epoch' + ms * interval '1 ms') as moment (at)
order by endpoint_id, part, path, kind
on conflict do nothing

-- name: findings_of
select finding.endpoint_id, finding.part, finding.path, finding.kind, finding.id, kept.examples, kept.largest,
       finding.replaced
from abreast.finding
cross join lateral (
    select count(*) as examples, coalesce(max(size), 0) as largest
    from abreast.finding_example
    where finding_id = finding.id
) as kept
where finding.endpoint_id = any(%(endpoints)s)

-- name: findings_lock
-- The fixed order prevents deadlocks between workers.
select from abreast.finding where id = any(%(ids)s) order by id for no key update

-- name: findings_count
-- Add to the counters. A fixed finding reopens if a later release shows it; without labels, if a later pair shows it. The
-- row is locked, so it reopens once.
with given as (
    select id, old_release, new_release, count, baseline_count, explained, new_greater, new_smaller,
           coalesce(turns, 0) as turns, coalesce(old_again, 0) as old_again, coalesce(new_again, 0) as new_again,
           coalesce(far_more, 0) as far_more, coalesce(far_less, 0) as far_less,
           coalesce(copies_far_more, 0) as copies_far_more, coalesce(copies_far_less, 0) as copies_far_less,
           array_position(array['additive', 'value', 'breaking'], impact) as severity,
           timestamptz 'epoch' + first_ms * interval '1 ms' as first,
           timestamptz 'epoch' + last_ms * interval '1 ms' as last
    from json_to_recordset(%(given)s::json) as given (
        id bigint, old_release integer, new_release integer, count bigint, baseline_count bigint, explained bigint,
        new_greater bigint, new_smaller bigint, turns bigint, old_again bigint, new_again bigint,
        far_more bigint, far_less bigint, copies_far_more bigint, copies_far_less bigint, impact text, first_ms bigint,
        last_ms bigint
    )
),
total as (
    select id, sum(count) as count, sum(baseline_count) as baseline_count, sum(explained) as explained,
           sum(new_greater) as new_greater, sum(new_smaller) as new_smaller,
           sum(turns) as turns, sum(old_again) as old_again, sum(new_again) as new_again,
           sum(far_more) as far_more, sum(far_less) as far_less, sum(copies_far_more) as copies_far_more,
           sum(copies_far_less) as copies_far_less, max(severity) as severity,
           min(first) as first, max(last) as last
    from given
    group by id
),
back as (
    select distinct on (f.id) f.id, r.label
    from given g
    join abreast.finding f on f.id = g.id
    join abreast.release r on r.id = g.new_release
    where f.status = 'fixed' and g.count > 0
      and (r.id > f.fixed_after or (r.label = '' and g.last > f.status_since))
    order by f.id, r.id desc
),
told as (
    insert into abreast.finding_event (finding_id, actor, before, after, release, reason)
    select id, 'abreast', 'fixed', 'reopened', label, 'seen again'
    from back
),
by_release as (
    insert into abreast.finding_release as known (
        finding_id, old_release, new_release, count, baseline_count, explained, new_greater, new_smaller, turns, old_again,
        new_again, far_more, far_less, copies_far_more, copies_far_less, first_seen, last_seen
    )
    select id, old_release, new_release, count, baseline_count, explained, new_greater, new_smaller, turns, old_again,
           new_again, far_more, far_less, copies_far_more, copies_far_less, first, last
    from given
    order by id, old_release, new_release
    on conflict (finding_id, old_release, new_release) do update
    set count = known.count + excluded.count,
        baseline_count = known.baseline_count + excluded.baseline_count,
        explained = known.explained + excluded.explained,
        new_greater = known.new_greater + excluded.new_greater,
        new_smaller = known.new_smaller + excluded.new_smaller,
        turns = known.turns + excluded.turns,
        old_again = known.old_again + excluded.old_again,
        new_again = known.new_again + excluded.new_again,
        far_more = known.far_more + excluded.far_more,
        far_less = known.far_less + excluded.far_less,
        copies_far_more = known.copies_far_more + excluded.copies_far_more,
        copies_far_less = known.copies_far_less + excluded.copies_far_less,
        first_seen = least(known.first_seen, excluded.first_seen),
        last_seen = greatest(known.last_seen, excluded.last_seen)
)
update abreast.finding
set count = finding.count + total.count,
    baseline_count = finding.baseline_count + total.baseline_count,
    explained = finding.explained + total.explained,
    new_greater = finding.new_greater + total.new_greater,
    new_smaller = finding.new_smaller + total.new_smaller,
    turns = finding.turns + total.turns,
    old_again = finding.old_again + total.old_again,
    new_again = finding.new_again + total.new_again,
    far_more = finding.far_more + total.far_more,
    far_less = finding.far_less + total.far_less,
    copies_far_more = finding.copies_far_more + total.copies_far_more,
    copies_far_less = finding.copies_far_less + total.copies_far_less,
    first_seen = case when finding.count = 0 and total.count > 0 then total.first
                      else least(finding.first_seen, total.first) end,
    last_seen = greatest(finding.last_seen, total.last),
    impact = case when total.severity > array_position(array['additive', 'value', 'breaking'], finding.impact)
                  then (array['additive', 'value', 'breaking'])[total.severity] else finding.impact end,
    status = case when back.id is null then finding.status else 'reopened' end,
    status_since = case when back.id is null then finding.status_since else clock_timestamp() end
from total left join back using (id)
where finding.id = total.id

-- name: drift_count
update abreast.finding set drift = drift + 1 where id = any(%(ids)s)

-- name: findings
-- Counts are those at `as_of`, the time of the first page, so that all pages agree. All time: the counter without later
-- pairs. A window: its counts without later pairs.
with candidate as (
    select f.*, abreast.of_no_pair(f) as of_no_pair, e.service, e.method, e.route, e.compared as compared_ever,
           case f.impact when 'breaking' then 0 when 'value' then 1 else 2 end as rank
    from abreast.finding f
    join abreast.endpoint e on e.id = f.endpoint_id
    where (%(ids)s::bigint[] is null or f.id = any(%(ids)s))
      and (%(service)s = '' or e.service = %(service)s)
      and (%(method)s = '' or e.method = %(method)s)
      and (%(route)s = '' or e.route = %(route)s)
      and (%(parts)s::text[] is null or f.part = any(%(parts)s))
      and (%(kinds)s::text[] is null or f.kind = any(%(kinds)s))
      and (%(impacts)s::text[] is null or f.impact = any(%(impacts)s))
      and (%(include_noise)s or %(only_explained)s or f.state <> 'noise' or f.status = 'confirmed'
           or f.count + f.baseline_count = 0) -- all is explained by something else
      and (%(include_settled)s or %(only_explained)s or f.status not in ('expected', 'fixed'))
),
-- What came after `as_of`, and the window without it.
since as materialized (
    select *
    from abreast.sums(%(endpoints)s::integer[], %(since)s::timestamptz, %(end)s::timestamptz)
    where %(release)s = '' or new_release = %(release)s
),
inside as materialized (
    select endpoint_id, outcome, findings, explained, explained_by, drift, pairs
    from abreast.sums(%(endpoints)s::integer[], %(start)s::timestamptz, %(end)s::timestamptz)
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
-- What rules explain, and what was drift of state: both stand beside a pair's findings.
by_rule as materialized (
    select one.finding_id, one.rule_id, sum(one.pairs)::bigint as pairs
    from (
        select finding_id, rule_id, count as pairs from abreast.rule_finding where not %(windowed)s and count > 0
        union all
        select shown.finding_id, shown.rule_id, s.pairs
        from inside s
        cross join lateral unnest(s.explained, s.explained_by) as shown (finding_id, rule_id)
        where s.explained is not null and %(windowed)s
    ) one
    group by one.finding_id, one.rule_id
    having sum(one.pairs) > 0
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
counted as (
    select c.*,
           case
               when c.of_no_pair then case
                   when c.last_seen >= coalesce(%(start)s::timestamptz, '-infinity')
                    and c.first_seen < coalesce(%(end)s::timestamptz, 'infinity') then c.count
                   else 0 end
               when %(windowed)s then coalesce(s.pairs, 0)
               else c.count - coalesce(s.pairs, 0)
           end as shown,
           -- Of all time; rows may have been dropped since.
           case when %(windowed)s then 0 else c.compared_ever - coalesce(e.pairs, 0) end as counted,
           exists (select from by_rule b where b.finding_id = c.id) as ruled,
           case when %(windowed)s then coalesce(d.pairs, 0) else c.drift end as drifts,
           c.status in ('expected', 'fixed') or (c.state = 'noise' and c.status <> 'confirmed') as waived
    from candidate c
    left join drifted d on d.id = c.id
    left join showing s on s.id = c.id
    left join compared_since e on e.endpoint_id = c.endpoint_id
),
page as (
    select *
    from counted
    where (%(ids)s::bigint[] is not null
           or (shown > 0 and (waived or not %(only_explained)s))
           or ((ruled or drifts > 0) and (%(include_settled)s or %(only_explained)s))
           or (not %(windowed)s and baseline_count > 0
               and (%(include_noise)s or %(only_explained)s) and (waived or not %(only_explained)s)))
      and (%(after_id)s::bigint is null or (rank, -shown, id) > (%(after_rank)s, -%(after_count)s::bigint, %(after_id)s))
    order by rank, shown desc, id
    limit %(limit)s
)
select p.id, p.service, p.method, p.route, p.part, p.path, p.kind, p.impact, p.shown as count, p.rank,
       p.baseline_count, p.state, p.reason, p.drifts, p.explained as shaped, p.first_seen, p.last_seen, p.detail,
       p.status, greatest(coalesce(c.pairs, 0), p.counted) as compared, r.old_releases, r.new_releases,
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
               where id in (select old_release from abreast.finding_release where finding_id = p.id and count > 0)
               order by id desc
               limit %(most_releases)s
           ) as old_releases,
           array(
               select label from abreast.release
               where id in (select new_release from abreast.finding_release where finding_id = p.id and count > 0)
               order by id desc
               limit %(most_releases)s
           ) as new_releases
) r
order by p.rank, p.shown desc, p.id

-- name: finding_examples
select p.day, p.id, p.at, e.service, e.method, e.route, p.outcome, p.live, p.request, p.old_status, p.new_status,
       p.old_us, p.new_us, p.old_release, p.new_release, p.findings, p.reason, p.explained, p.explained_by, p.drift,
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
order by fe.size, fe.day, fe.pair_id
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

-- name: finding_status
-- Set a status. The row is locked already, so this reads the last committed counters. No row is returned if the named
-- release or a later one has shown the finding.
with found as (
    select f.id, f.status, e.service,
           (
               select id from abreast.release
               where service = e.service and version = 'new' and label = %(release)s and %(release)s <> ''
           ) as named,
           (
               select coalesce(max(id), 0) from abreast.release where service = e.service and version = 'new'
           ) as newest
    from abreast.finding f join abreast.endpoint e on e.id = f.endpoint_id
    where f.id = %(id)s
),
allowed as (
    select *
    from found
    where %(status)s <> 'fixed' or named is null
       or not exists (
           select from abreast.finding_release
           where finding_id = found.id and count > 0 and new_release >= named
       )
),
told as (
    insert into abreast.finding_event (finding_id, actor, before, after, release, reason)
    select id, %(actor)s, status, %(status)s, %(release)s, %(reason)s from allowed
)
update abreast.finding
set status = %(status)s, status_since = clock_timestamp(),
    fixed_after = case when %(status)s = 'fixed' then coalesce(allowed.named - 1, allowed.newest) end
from allowed
where finding.id = allowed.id
returning finding.id

-- name: findings_back
-- Reopen fixed findings of detectors if they hold in a later release.
with found as (
    select f.id, newest.label
    from abreast.finding f
    join abreast.endpoint e on e.id = f.endpoint_id
    cross join lateral (
        select id, label, first_seen
        from abreast.release
        where service = e.service and version = 'new'
        order by id desc
        limit 1
    ) as newest
    where f.status = 'fixed' and abreast.of_no_pair(f)
      and (
          (newest.id > f.fixed_after and f.last_seen > newest.first_seen)
          or (newest.label = '' and f.last_seen > f.status_since)
      )
    order by f.id
    for no key update of f
),
told as (
    insert into abreast.finding_event (finding_id, actor, before, after, release, reason)
    select id, 'abreast', 'fixed', 'reopened', label, 'seen again' from found
)
update abreast.finding
set status = 'reopened', status_since = clock_timestamp()
from found
where finding.id = found.id
