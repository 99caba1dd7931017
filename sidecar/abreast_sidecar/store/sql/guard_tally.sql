-- Each rule over two windows that began one after the other. `live`: requests of users that new answered, or should have;
-- `new_errors` and `old_errors` are of one side alone. At most so many of the newest rows, so that a look stays cheap.
with chosen as (
    select id from abreast.endpoint where service = %(service)s
),
shown as (
    select coalesce(array_agg(f.id), '{}') as real
    from abreast.finding f
    where f.endpoint_id in (select id from chosen) and f.impact <> 'additive' and f.state = 'real'
),
newest as (
    select p.at, p.findings, p.old_us, p.new_us, p.outcome, p.old_status, p.new_status, p.failed_over,
           p.outcome in ('match', 'mismatch', 'oversize') as compared,
           p.live = 'new' or p.failed_over as live
    from abreast.pair p
    where p.endpoint_id in (select id from chosen)
      and p.at >= (select min(start) from unnest(%(starts)s::timestamptz[]) as start)
      and p.at >= clock_timestamp() - interval '2 days'
    order by p.at desc
    limit %(most)s
),
said as (
    select n.at,
           n.compared as compared,
           n.compared and n.findings <> '{}' and n.findings && (select real from shown) as mismatch,
           n.live and (n.compared or n.failed_over) as live,
           (n.failed_over or coalesce(n.new_status, 0) not between 1 and 499) as new_error,
           coalesce(n.old_status, 0) not between 1 and 499 as old_error,
           n.outcome in ('match', 'mismatch') and n.old_status = n.new_status and n.old_us is not null
               and n.new_us is not null as timed,
           n.new_us > n.old_us * (1 + %(slower)s::float8) as slower
    from newest n
)
select w.number,
       count(*) filter (where s.live) as live,
       count(*) filter (where s.live and s.new_error and not s.old_error) as new_errors,
       count(*) filter (where s.live and s.old_error and not s.new_error) as old_errors,
       count(*) filter (where s.compared) as compared,
       count(*) filter (where s.mismatch) as mismatches,
       count(*) filter (where s.timed) as timed,
       count(*) filter (where s.timed and s.slower) as slower
from unnest(%(starts)s::timestamptz[]) with ordinality as w (start, number)
left join said s on s.at >= w.start
group by w.number
order by w.number
