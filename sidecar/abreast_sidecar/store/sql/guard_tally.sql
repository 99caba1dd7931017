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
           p.outcome in ('match', 'mismatch', 'partial', 'oversize') as compared,
           p.live = 'new' or p.failed_over as live, p.copy_us
    from abreast.pair p
    where p.endpoint_id in (select id from chosen)
      and p.at >= (select min(start) from unnest(%(starts)s::timestamptz[]) as start)
      and p.at < %(now)s::timestamptz + interval '1 minute'
    order by p.at desc
    limit %(most)s
),
threshold as (
    select array_agg(distinct start order by start) as starts from unnest(%(starts)s::timestamptz[]) as start
),
said as (
    select width_bucket(n.at, (select starts from threshold)) as part, -- between two starts
           n.compared as compared,
           n.compared and n.findings <> '{}' and n.findings && (select real from shown) as mismatch,
           n.live and (n.compared or n.failed_over) as live,
           (n.failed_over or coalesce(n.new_status, 0) not between 1 and 499) as new_error,
           coalesce(n.old_status, 0) not between 1 and 499 as old_error,
           n.outcome in ('match', 'mismatch') and n.old_status = n.new_status and n.old_us is not null
               and n.new_us is not null as timed,
           n.new_us - n.old_us > greatest(n.old_us * %(slower)s::float8, %(min_slower_us)s) as slower,
           n.copy_us is not null as copied,
           n.new_us - n.copy_us > greatest(n.copy_us * %(slower)s::float8, %(min_slower_us)s) as slower_copy
    from newest n
),
counted as (
    select part,
           count(*) filter (where live) as live,
           count(*) filter (where live and new_error and not old_error) as new_errors,
           count(*) filter (where live and old_error and not new_error) as old_errors,
           count(*) filter (where compared) as compared,
           count(*) filter (where mismatch) as mismatches,
           count(*) filter (where timed) as timed,
           count(*) filter (where timed and slower) as slower,
           count(*) filter (where timed and copied) as copies,
           count(*) filter (where timed and slower_copy) as slower_copies
    from said
    group by part
)
select w.number,
       coalesce(sum(c.live), 0)::bigint as live,
       coalesce(sum(c.new_errors), 0)::bigint as new_errors,
       coalesce(sum(c.old_errors), 0)::bigint as old_errors,
       coalesce(sum(c.compared), 0)::bigint as compared,
       coalesce(sum(c.mismatches), 0)::bigint as mismatches,
       coalesce(case when sum(c.copies) >= %(least_copies)s then sum(c.copies) else sum(c.timed) end, 0)::bigint as timed,
       coalesce(case when sum(c.copies) >= %(least_copies)s then sum(c.slower_copies) else sum(c.slower) end, 0)::bigint
           as slower
from unnest(%(starts)s::timestamptz[]) with ordinality as w (start, number)
left join counted c on c.part >= width_bucket(w.start, (select starts from threshold))
group by w.number
order by w.number
