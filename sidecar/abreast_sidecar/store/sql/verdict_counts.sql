-- Of each endpoint, over what the window has of the release that is judged: pairs that name it, and of pairs without an
-- answer of new those of its time. Findings of part latency are of no single pairs, and no row has them. Times are
-- those of the newest pairs: of two copies, where there are enough.
-- Places in the index, from where a release began to where it ended: by an equal sign the planner may go through the pairs of
-- all endpoints, back to an endpoint that is rare, or to a release of long ago; by two ranges it expects few and sorts all.
with inside as materialized (
    select *
    from abreast.sums(%(endpoints)s::integer[], %(start)s::timestamptz, %(end)s::timestamptz)
    where %(release)s::text is null or new_release = %(release)s
    union all
    select *
    from abreast.sums(%(endpoints)s::integer[], %(lone_start)s::timestamptz, %(lone_end)s::timestamptz)
    where new_release <> %(release)s::text and new_status is null
),
-- Caches, pools and compilers are cold at first: of each release's pairs, all but the first are `warm`.
release as materialized ( -- once, not for each endpoint
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
      and (abreast.open_regression(f)
           -- What was said to be fixed counts on in the release that showed it, where releases have names and one is
           -- judged; else that it does not come back is all there is.
           or (f.status = 'fixed' and f.impact <> 'additive' and f.state <> 'noise' and %(release)s::text <> ''))
),
counted as (
    select i.endpoint_id,
           min(i.first) filter (where i.new_status is not null) as first,
           max(i.last) filter (where i.new_status is not null) as last,
           coalesce(sum(i.pairs) filter (where i.old_status is not null), 0)::bigint as old_requests,
           coalesce(sum(i.pairs) filter (where i.new_status is not null), 0)::bigint as new_requests,
           coalesce(sum(i.pairs) filter (where said.compared), 0)::bigint as compared,
           coalesce(sum(i.pairs) filter (where i.outcome = 'partial'), 0)::bigint as partial,
           coalesce(sum(i.pairs) filter (where said.compared and said.real), 0)::bigint as mismatches,
           coalesce(sum(i.pairs) filter (where said.compared and said.undecided and not said.real), 0)::bigint as undecided,
           coalesce(sum(i.pairs) filter (where said.compared and i.explained is not null and not said.real), 0)::bigint
               as by_rules,
           coalesce(sum(i.pairs) filter (where said.compared and said.new_error and not said.old_error), 0)::bigint
               as new_errors,
           coalesce(sum(i.pairs) filter (where said.compared and said.old_error and not said.new_error), 0)::bigint
               as old_errors
    from inside i
    cross join lateral (
        select i.findings <> '{}' and i.findings && (select real from shown) as real,
               i.findings <> '{}' and i.findings && (select undecided from shown) as undecided
    ) as told
    cross join lateral (
        -- Of bodies that are too large only a digest is known: where that is noise, nothing was compared.
        select i.outcome in ('match', 'mismatch', 'partial') or (i.outcome = 'oversize' and (told.real or told.undecided)) as compared,
               told.real, told.undecided,
               coalesce(i.old_status, 0) not between 1 and 499 as old_error,
               coalesce(i.new_status, 0) not between 1 and 499 as new_error
    ) as said
    group by i.endpoint_id
    having sum(i.pairs) > 0
)
select e.method, e.route, c.old_requests, c.new_requests, c.compared, c.partial, c.mismatches, c.undecided, c.by_rules,
       c.new_errors, c.old_errors, times.timed, times.slower
from counted c
join abreast.endpoint e on e.id = c.endpoint_id
cross join lateral (
    select case when enough then copies when abreast.copies_to_come(e, every) then 0 else every end as timed,
           case when enough then slower_copies when abreast.copies_to_come(e, every) then 0 else slower end as slower
    from (
        select count(*) as every, count(copy_us) as copies, count(copy_us) >= %(least_copies)s as enough,
               count(*) filter (where new_us - old_us > greatest(old_us * %(max_slower)s::float8, %(min_slower_us)s)) as slower,
               count(*) filter (where new_us - copy_us > greatest(copy_us * %(max_slower)s::float8, %(min_slower_us)s)) as slower_copies
        from (
            select latest.*, row_number() over (partition by old_release, new_release order by at desc, id desc) as newer
            from (
                select p.at, p.id, p.old_release, p.new_release, p.outcome, p.old_status, p.new_status, p.old_us, p.new_us,
                       p.copy_us
                from abreast.pair p
                where (p.endpoint_id, p.at) >= (c.endpoint_id, c.first) and (p.endpoint_id, p.at) <= (c.endpoint_id, c.last)
                order by p.endpoint_id desc, p.at desc, p.id desc
                limit %(newest)s
            ) as latest
            where %(release)s::text is null or new_release = %(release)s
        ) as newest
        join release r on r.endpoint_id = c.endpoint_id and r.old_release = newest.old_release
            and r.new_release = newest.new_release and newest.newer <= r.warm
        where newest.outcome in ('match', 'mismatch') and newest.old_status = newest.new_status
          and newest.old_us is not null and newest.new_us is not null
    ) as found
) as times
order by e.route, e.method
