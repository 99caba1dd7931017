-- Of an endpoint's own newest copies, or of all of its service's where it has too few; what is known stays where there are
-- too few of both.
with copied as (
    select endpoint.id, endpoint.service, (one.copy_us + 1.0) / (one.old_us + 1) as ratio
    from abreast.endpoint
    cross join lateral (
        select old_us, copy_us
        from abreast.pair
        where endpoint_id = endpoint.id and at > clock_timestamp() - %(window)s * interval '1 second'
        order by at desc
        limit %(most)s
    ) as one
    where one.copy_us is not null and one.old_us is not null
),
own as (
    select id, percentile_cont(0.5) within group (order by ratio) as ratio, count(*) as copies from copied group by id
),
every as (
    select service, percentile_cont(0.5) within group (order by ratio) as ratio, count(*) as copies
    from copied
    group by service
),
chosen as (
    select endpoint.id,
           case when own.copies >= %(least)s then own.ratio else every.ratio end as ratio,
           case when own.copies >= %(least)s then own.copies else every.copies end as copies,
           coalesce(own.copies >= %(least)s, false) as own
    from abreast.endpoint
    join every using (service)
    left join own using (id)
)
insert into abreast.copy_cost (endpoint_id, ratio, copies, own)
select id, ratio, copies, own
from chosen
where copies >= %(least)s
order by id
on conflict (endpoint_id) do update set ratio = excluded.ratio, copies = excluded.copies, own = excluded.own
