-- Counts are those of the moment `as_of`, when the first page was asked for, so that the pages of one listing fit
-- together while traffic goes on: all time is the counter without what came since, a window its sums without that.
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
