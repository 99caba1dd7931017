-- name: replica_put
-- A starting sidecar replaces the dead one at its address.
with expired as (
    select id from abreast.replica
    where id <> %(id)s and (not abreast.is_alive(seen, %(expires)s) or %(begins)s and sidecar = %(sidecar)s)
    for update skip locked
), dropped as (
    delete from abreast.replica where id in (select id from expired) returning id
), put as (
    insert into abreast.replica (id, sidecar, seen, envoys)
    values (%(id)s, %(sidecar)s, clock_timestamp(), %(envoys)s::jsonb)
    on conflict (id) do update set seen = excluded.seen, sidecar = excluded.sidecar, envoys = excluded.envoys
    returning id
)
select pg_notify('abreast_envoys', '') where %(news)s or exists (select from dropped)

-- name: replica_drop
with dropped as (
    delete from abreast.replica where id = %(id)s returning id
)
select pg_notify('abreast_envoys', '') from dropped

-- name: replica_envoys
-- Return the Envoys of all other sidecars.
select replica.sidecar, envoy.*
from abreast.replica
cross join jsonb_to_recordset(replica.envoys) as envoy (
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
where replica.id <> %(id)s and abreast.is_alive(replica.seen, %(expires)s) and envoy.service = %(service)s

-- name: envoy_report
-- `age` is by Postgres's clock or the sidecar's, whichever is less: either may have been set since.
select counted, last,
       least(extract(epoch from clock_timestamp() - seen), extract(epoch from %(own)s::timestamptz - asked))::float8 as age
from abreast.envoy_report where node = %(node)s and service = %(service)s

-- name: envoy_report_put
insert into abreast.envoy_report (node, service, seen, asked, counted, last)
values (%(node)s, %(service)s, clock_timestamp(), %(own)s, %(counted)s::jsonb, %(last)s::jsonb)
on conflict (node, service) do update
set seen = excluded.seen, asked = excluded.asked, counted = excluded.counted, last = excluded.last

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

-- name: envoy_sampled
select abreast.envoy_sampled(%(service)s, %(start)s::timestamptz, %(end)s::timestamptz) as sampled
