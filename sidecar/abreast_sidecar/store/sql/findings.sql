-- Counts are those of the moment `as_of`, when the first page was asked for, so that the pages of one listing fit
-- together while traffic goes on: all time is the counter without what came since; a window is counted from rows.
with candidate as (
    select f.*, e.service, e.method, e.route,
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
      and (%(include_noise)s or f.state <> 'noise')
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
                     and (%(start)s::timestamptz is null or p.at >= %(start)s)
                     and (%(end)s::timestamptz is null or p.at < %(end)s)
               )
               else c.count - (
                   select count(*) from abreast.pair p where p.findings @> array[c.id] and p.at >= %(as_of)s
               )
           end as shown
    from candidate c
),
page as (
    select *
    from counted
    where (%(ids)s::bigint[] is not null
           or shown > 0
           or (%(include_noise)s and not %(windowed)s and baseline_count > 0))
      and (%(after_id)s::bigint is null or (rank, -shown, id) > (%(after_rank)s, -%(after_count)s::bigint, %(after_id)s))
    order by rank, shown desc, id
    limit %(limit)s
)
select p.id, p.service, p.method, p.route, p.part, p.path, p.kind, p.impact, p.shown as count, p.rank,
       p.baseline_count, p.state, p.reason, p.first_seen, p.last_seen, p.detail, c.compared
from page p
cross join lateral (
    select count(*) as compared
    from abreast.pair q
    where q.endpoint_id = p.endpoint_id and q.outcome in ('match', 'mismatch') and q.at < %(as_of)s
      and (%(start)s::timestamptz is null or q.at >= %(start)s)
      and (%(end)s::timestamptz is null or q.at < %(end)s)
) c
order by p.rank, p.shown desc, p.id
