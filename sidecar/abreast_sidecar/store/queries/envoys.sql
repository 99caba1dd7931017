-- name: sidecar_set
-- A starting sidecar replaces the dead one at its address.
with expired as (
    select id from abreast.sidecar
    where id <> %(id)s and (not abreast.is_alive(seen, %(expires)s) or %(starts)s and address = %(address)s)
    for update skip locked
), dropped as (
    delete from abreast.sidecar where id in (select id from expired) returning id
), put as (
    insert into abreast.sidecar (id, address, seen, envoys)
    values (%(id)s, %(address)s, clock_timestamp(), %(envoys)s::jsonb)
    on conflict (id) do update set seen = excluded.seen, address = excluded.address, envoys = excluded.envoys
    returning id
)
select pg_notify('abreast_envoys', '') where %(changed)s or exists (select from dropped)

-- name: sidecar_delete
with dropped as (
    delete from abreast.sidecar where id = %(id)s returning id
)
select pg_notify('abreast_envoys', '') from dropped

-- name: sidecar_envoys
-- Return the Envoys of all other sidecars.
select sidecar.address as sidecar, envoy.*
from abreast.sidecar
cross join jsonb_to_recordset(sidecar.envoys) as envoy (
    service text,
    node text,
    peer text,
    number bigint,
    acknowledged_at timestamptz,
    acknowledged_version bigint,
    answered_at timestamptz,
    answered_version bigint,
    after float8,
    error text
)
where sidecar.id <> %(id)s and abreast.is_alive(sidecar.seen, %(expires)s) and envoy.service = %(service)s

-- name: envoy_report
-- `age` is by Postgres's clock or the sidecar's, whichever is less: either may have been set since.
select totals, last_reading,
       least(extract(epoch from clock_timestamp() - seen), extract(epoch from %(sidecar_time)s::timestamptz - sidecar_seen))::float8 as age
from abreast.envoy_report where node = %(node)s and service = %(service)s

-- name: envoy_report_set
insert into abreast.envoy_report (node, service, seen, sidecar_seen, totals, last_reading)
values (%(node)s, %(service)s, clock_timestamp(), %(sidecar_time)s, %(totals)s::jsonb, %(last_reading)s::jsonb)
on conflict (node, service) do update
set seen = excluded.seen, sidecar_seen = excluded.sidecar_seen, totals = excluded.totals,
    last_reading = excluded.last_reading

-- name: envoy_reports
select node, extract(epoch from clock_timestamp() - seen)::float8 as age
from abreast.envoy_report
where service = %(service)s
order by node

-- name: envoy_count_add
-- Spread a count evenly over its seconds, in whole requests.
with span as (
    select clock_timestamp() - %(seconds)s * interval '1 second' as start, clock_timestamp() as until
)
insert into abreast.envoy_count as stored (service, at, sampled)
select %(service)s, at, sampled
from (
    select at, round(%(sampled)s * end_part) - round(%(sampled)s * start_part) as sampled
    from (
        select bucket.at,
               extract(epoch from greatest(bucket.at, start) - start) / extract(epoch from until - start) as start_part,
               extract(epoch from least(bucket.at + interval '10 seconds', until) - start)
                   / extract(epoch from until - start) as end_part
        from span
        cross join generate_series(date_bin('10 seconds', start, 'epoch'), until, interval '10 seconds') as bucket (at)
        where bucket.at < until
    ) as part
) as counted
where sampled > 0
order by at
on conflict (service, at) do update set sampled = stored.sampled + excluded.sampled

-- name: envoy_sampled
select abreast.envoy_sampled(%(service)s, %(start)s::timestamptz, %(end)s::timestamptz) as sampled
