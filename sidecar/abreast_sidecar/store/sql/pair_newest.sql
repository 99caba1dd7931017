-- How long ago (seconds) the last pair of the service was compared; negative where this clock is behind. What is of a time to
-- come by both clocks is not the last.
-- `between`: by an equal sign the planner may go through the pairs of all endpoints, back to an endpoint that is rare.
select extract(epoch from clock_timestamp() - max(newest.at))::float8 as age
from abreast.endpoint e
cross join lateral (
    select p.at from abreast.pair p
    where p.endpoint_id between e.id and e.id and p.outcome in ('match', 'mismatch', 'partial', 'oversize')
      and p.at < greatest(clock_timestamp(), %(own)s) + interval '1 minute'
    order by p.endpoint_id desc, p.at desc limit 1
) as newest
where e.service = %(service)s
