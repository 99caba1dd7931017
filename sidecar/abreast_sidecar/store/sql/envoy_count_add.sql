-- Spread evenly over the seconds in which they were counted, in whole requests.
with span as (
    select clock_timestamp() - %(seconds)s * interval '1 second' as start, clock_timestamp() as until
)
insert into abreast.envoy_count as known (service, at, sampled)
select %(service)s, at, sampled
from (
    select at, round(%(sampled)s * over) - round(%(sampled)s * before) as sampled
    from (
        select bucket.at,
               extract(epoch from greatest(bucket.at, start) - start) / extract(epoch from until - start) as before,
               extract(epoch from least(bucket.at + interval '10 seconds', until) - start)
                   / extract(epoch from until - start) as over
        from span
        cross join generate_series(date_bin('10 seconds', start, 'epoch'), until, interval '10 seconds') as bucket (at)
        where bucket.at < until
    ) as part
) as counted
where sampled > 0
order by at
on conflict (service, at) do update set sampled = known.sampled + excluded.sampled
