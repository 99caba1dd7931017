-- The last pairs of each endpoint in which both versions asked a cache, in the order of their arrival.
-- `between`: by an equal sign the planner may go through the pairs of all endpoints, back to an endpoint that is rare.
select endpoint.id, counted.*
from abreast.endpoint
cross join lateral (
    select array_agg(old_hits order by at, id) as old_hits, array_agg(old_misses order by at, id) as old_misses,
           array_agg(new_hits order by at, id) as new_hits, array_agg(new_misses order by at, id) as new_misses,
           array_agg(release order by at, id) as release
    from (
        select newest.*
        from (
            select at, id, outcome, old_hits, old_misses, new_hits, new_misses, old_release || ' ' || new_release as release
            from abreast.pair
            where endpoint_id between endpoint.id and endpoint.id
              and at > (select clock_timestamp() - %(window)s * interval '1 second')
            order by endpoint_id desc, at desc
            limit %(most)s
        ) as newest
        where outcome in ('match', 'mismatch') and old_hits is not null and new_hits is not null
    ) as recent
) as counted
where cardinality(counted.old_hits) >= %(least)s
