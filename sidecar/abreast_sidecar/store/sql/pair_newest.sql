-- How long ago (seconds) the last pair of the service was compared.
select extract(epoch from clock_timestamp() - max(newest.at))::float8 as age
from abreast.endpoint e
cross join lateral (
    select p.at from abreast.pair p
    where p.endpoint_id = e.id and p.outcome in ('match', 'mismatch', 'partial', 'oversize')
    order by p.at desc limit 1
) as newest
where e.service = %(service)s
