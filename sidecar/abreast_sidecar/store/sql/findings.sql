-- Counts are those of the moment `as_of`, when the first page was asked for, so that the pages of one listing fit
-- together while traffic goes on: all time is the counter without what came since; a window is counted from rows.
with candidate as (
    select f.*, e.service, e.method, e.route, e.compared as compared_ever,
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
      and (%(include_noise)s or %(only_explained)s or f.state <> 'noise' or f.status = 'confirmed')
      and (%(include_settled)s or %(only_explained)s or f.status not in ('expected', 'fixed'))
      and (not %(only_explained)s or f.status in ('expected', 'fixed') or (f.state = 'noise' and f.status <> 'confirmed'))
),
counted as (
    select c.*,
           case
               when c.part in ('latency', 'cache') or c.path = 'no capture' then case  -- of no single pairs
                   when c.last_seen >= coalesce(%(start)s::timestamptz, '-infinity')
                    and c.first_seen < coalesce(%(end)s::timestamptz, 'infinity') then c.count
                   else 0 end
               when %(windowed)s then (
                   select count(*) from abreast.pair p
                   where p.findings @> array[c.id] and p.at < %(as_of)s
                     and (%(release)s = '' or p.new_release = %(release)s)
                     and (%(start)s::timestamptz is null or p.at >= %(start)s)
                     and (%(end)s::timestamptz is null or p.at < %(end)s)
               )
               else c.count - (
                   select count(*) from abreast.pair p where p.findings @> array[c.id] and p.at >= %(as_of)s
               )
           end as shown,
           -- Of all time; rows may have been dropped since.
           case when %(windowed)s then 0 else c.compared_ever - (
               select count(*) from abreast.pair p
               where p.endpoint_id = c.endpoint_id and p.outcome in ('match', 'mismatch', 'oversize')
                 and p.at >= %(as_of)s
           ) end as counted
    from candidate c
),
page as (
    select *
    from counted
    where (%(ids)s::bigint[] is not null
           or shown > 0
           or (%(only_explained)s and not %(windowed)s and drift > 0)
           or ((%(include_noise)s or %(only_explained)s) and not %(windowed)s and baseline_count > 0))
      and (%(after_id)s::bigint is null or (rank, -shown, id) > (%(after_rank)s, -%(after_count)s::bigint, %(after_id)s))
    order by rank, shown desc, id
    limit %(limit)s
)
select p.id, p.service, p.method, p.route, p.part, p.path, p.kind, p.impact, p.shown as count, p.rank,
       p.baseline_count, p.state, p.reason, p.drift, p.first_seen, p.last_seen, p.detail,
       p.status, greatest(c.compared, p.counted) as compared, r.old_releases, r.new_releases,
       coalesce(
           (select reason from abreast.finding_event where finding_id = p.id order by id desc limit 1), ''
       ) as status_reason
from page p
cross join lateral (
    select count(*) as compared
    from abreast.pair q
    where q.endpoint_id = p.endpoint_id and q.outcome in ('match', 'mismatch', 'oversize') and q.at < %(as_of)s
      and (%(release)s = '' or q.new_release = %(release)s)
      and (%(start)s::timestamptz is null or q.at >= %(start)s)
      and (%(end)s::timestamptz is null or q.at < %(end)s)
) c
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
