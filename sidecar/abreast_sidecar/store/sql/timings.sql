-- The last pairs of each endpoint that both versions answered alike, in the order of their arrival, with the latest
-- release of new among them alone: what one release did is not said of the next.
-- `between`: by an equal sign the planner may go through the pairs of all endpoints, back to an endpoint that is rare.
select endpoint.id, timing.old_us, timing.new_us, timing.release, timing.copy_us,
       abreast.copies_to_come(endpoint, cardinality(timing.old_us)) as copies_to_come
from abreast.endpoint
cross join lateral (
    select array_agg(old_us order by at, id) as old_us, array_agg(new_us order by at, id) as new_us,
           array_agg(release order by at, id) as release, array_agg(copy_us order by at, id) as copy_us
    from (
        select newest.*, release.id as number, max(release.id) over () as latest
        from (
            select at, id, outcome, old_status, new_status, old_us, new_us, old_release || ' ' || new_release as release,
                   new_release, copy_us
            from abreast.pair
            where endpoint_id between endpoint.id and endpoint.id
              and at > (select clock_timestamp() - %(window)s * interval '1 second')
            order by endpoint_id desc, at desc
            limit %(most)s
        ) as newest
        left join abreast.release
            on release.service = endpoint.service and release.version = 'new' and release.label = newest.new_release
        where outcome in ('match', 'mismatch') and old_status = new_status and old_us is not null and new_us is not null
    ) as recent
    where number is not distinct from latest
) as timing
where cardinality(timing.old_us) >= %(least)s
