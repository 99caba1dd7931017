-- Endpoints of which old has a capture and new has none, clearly more often than the other way round: new does not answer
-- in time there, or does not capture. Among the last pairs of each endpoint since the latest release of new came.
-- `between`: by an equal sign the planner may go through the pairs of all endpoints, back to an endpoint that is rare.
insert into abreast.finding (endpoint_id, part, path, kind, impact, count, first_seen, last_seen, state, reason)
select endpoint.id, 'error', 'no capture', 'removed', 'breaking', recent.only_old, recent.first, recent.last, 'real',
       format('of the last %%s requests, %%s have no capture of new and %%s none of old', recent.pairs, recent.only_old, recent.only_new)
from abreast.endpoint
left join lateral (
    select first_seen
    from abreast.release r
    where service = endpoint.service and version = 'new'
      and exists (select from abreast.release f where f.service = r.service and f.version = 'new' and f.id < r.id)
    order by id desc
    limit 1
) as latest on true
cross join lateral (
    select count(*) as pairs,
           count(*) filter (where outcome = 'only_old') as only_old,
           count(*) filter (where outcome = 'only_new') as only_new,
           min(at) filter (where outcome = 'only_old') as first,
           max(at) filter (where outcome = 'only_old') as last
    from (
        select at, outcome
        from abreast.pair
        where endpoint_id between endpoint.id and endpoint.id
          and at > (select greatest(clock_timestamp() - %(window)s * interval '1 second', latest.first_seen))
        order by endpoint_id desc, at desc
        limit %(most)s
    ) as newest
) as recent
where recent.only_old >= %(least)s and recent.only_old >= 3 * (recent.only_new + 1)
  and recent.only_old >= recent.pairs * %(share)s
on conflict (endpoint_id, part, path, kind)
do update set count = excluded.count, last_seen = excluded.last_seen, reason = excluded.reason
