-- Of each endpoint, over the rows of the window with the release that is judged. A row without an answer of new names no
-- release of it: it belongs to the latest that had come. Findings of part latency are of no single pairs,
-- and no row has them.
with chosen as (
    select id, method, route from abreast.endpoint where service = %(service)s
),
judged as (
    select case when exists (
               select from abreast.release f where f.service = r.service and f.version = 'new' and f.id < r.id
           ) then first_seen else '-infinity' end as first_seen,
           coalesce((
               select min(first_seen) from abreast.release f
               where f.service = r.service and f.version = 'new' and f.id > r.id
           ), 'infinity') as over
    from abreast.release r
    where service = %(service)s and version = 'new' and label = %(release)s::text
),
-- Caches, pools and compilers are cold at first: `warm` is when a share of each release's time is over.
release as (
    select p.endpoint_id, p.old_release, p.new_release,
           min(p.at) + (max(p.at) - min(p.at)) * %(cold_share)s::float8 as warm
    from abreast.pair p
    where p.endpoint_id in (select id from chosen)
      and (%(release)s::text is null or p.new_release = %(release)s
           or (p.new_status is null and p.at >= (select first_seen from judged) and p.at < (select over from judged)))
      and (%(start)s::timestamptz is null or p.at >= %(start)s)
      and (%(end)s::timestamptz is null or p.at < %(end)s)
    group by p.endpoint_id, p.old_release, p.new_release
),
shown as (
    select coalesce(array_agg(f.id) filter (where f.state = 'real' or f.status = 'confirmed'), '{}') as real,
           coalesce(array_agg(f.id) filter (where f.state = 'undecided' and f.status <> 'confirmed'), '{}') as undecided
    from abreast.finding f
    where f.endpoint_id in (select id from chosen)
      and (abreast.open_regression(f)
           -- What was said to be fixed counts on in the release that showed it, where releases have names and one is
           -- judged; else that it does not come back is all there is.
           or (f.status = 'fixed' and f.impact <> 'additive' and f.state <> 'noise' and %(release)s::text <> ''))
),
counted as (
    select p.endpoint_id,
           count(p.old_status) as old_requests,
           count(p.new_status) as new_requests,
           count(*) filter (where said.compared) as compared,
           count(*) filter (where said.compared and said.real) as mismatches,
           count(*) filter (where said.compared and said.undecided and not said.real) as undecided,
           count(*) filter (where said.compared and said.new_error and not said.old_error) as new_errors,
           count(*) filter (where said.compared and said.old_error and not said.new_error) as old_errors,
           count(*) filter (where said.timed) as timed,
           count(*) filter (where said.timed and p.new_us > p.old_us * (1 + %(max_slower)s::float8)
                                       * abreast.handicap(p.live, c.ratio)) as slower
    from abreast.pair p
    join release r using (endpoint_id, old_release, new_release)
    left join abreast.copy_cost c using (endpoint_id)
    cross join lateral (
        select p.outcome in ('match', 'mismatch', 'oversize') as compared,
               p.findings <> '{}' and p.findings && (select real from shown) as real,
               p.findings <> '{}' and p.findings && (select undecided from shown) as undecided,
               coalesce(p.old_status, 0) not between 1 and 499 as old_error,
               coalesce(p.new_status, 0) not between 1 and 499 as new_error,
               p.outcome in ('match', 'mismatch') and p.old_status = p.new_status and p.at > r.warm
                   and p.old_us is not null and p.new_us is not null as timed
    ) as said
    where (%(release)s::text is null or p.new_release = %(release)s
           or (p.new_status is null and p.at >= (select first_seen from judged) and p.at < (select over from judged)))
      and (%(start)s::timestamptz is null or p.at >= %(start)s)
      and (%(end)s::timestamptz is null or p.at < %(end)s)
    group by p.endpoint_id
)
select chosen.method, chosen.route, counted.old_requests, counted.new_requests, counted.compared, counted.mismatches,
       counted.undecided, counted.new_errors, counted.old_errors, counted.timed, counted.slower
from counted join chosen on chosen.id = counted.endpoint_id
order by chosen.route, chosen.method
