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
select sidecar.address as sidecar, service, node, peer, number, coalesce(acknowledged, '') as acknowledged,
       coalesce(answered, '') as answered, after, error, coalesce(rules, '[]') as rules
from abreast.sidecar
cross join jsonb_to_recordset(sidecar.envoys) as envoy (
    service text,
    node text,
    peer text,
    number bigint,
    acknowledged text,
    answered text,
    after float8,
    error text,
    rules jsonb
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

-- name: envoy_streams_set
insert into abreast.envoy_stream as stored (service, stream, node, counted, seen)
select %(service)s, stream, %(node)s, counted, clock_timestamp()
from json_to_recordset(%(rows)s::json) as input (stream text, counted bigint)
order by stream
on conflict (service, stream) do update
set node = excluded.node, counted = greatest(stored.counted, excluded.counted), seen = excluded.seen

-- name: envoy_streams_adopt
-- Give the streams of Envoys that ended before their first reading to this node.
update abreast.envoy_stream set node = %(node)s
where service = %(service)s and node = '' and seen < clock_timestamp() - interval '30 seconds'

-- name: envoy_stream_total
select coalesce(sum(greatest(counted, highest)), 0)::bigint as sampled
from abreast.envoy_stream
where service = %(service)s and node = %(node)s

-- name: envoy_reports_raise
-- Raise the totals of nodes that no sidecar reads any more by captures that arrived after their last reading.
update abreast.envoy_report r
set totals = r.totals || jsonb_build_object('sampled', known.sampled)
from (
    select stale.node, (
               select sum(greatest(counted, highest)) from abreast.envoy_stream s
               where (s.service, s.node) = (stale.service, stale.node)
           )::bigint as sampled
    from abreast.envoy_report stale
    where stale.service = %(service)s and stale.node <> %(node)s
      and stale.seen < clock_timestamp() - interval '30 seconds'
    for update skip locked
) as known
where r.service = %(service)s and r.node = known.node and known.sampled > (r.totals->>'sampled')::bigint

-- name: envoy_reports
select node, extract(epoch from clock_timestamp() - seen)::float8 as age,
       coalesce((last_reading->>'overrides')::int, 0) > 0 as is_overridden
from abreast.envoy_report
where service = %(service)s
order by node

-- name: envoy_count_add
-- Spread a count evenly over its seconds, in whole requests.
with span as (
    select clock_timestamp() - %(seconds)s * interval '1 second' as start, clock_timestamp() as until
)
insert into abreast.envoy_count as stored (service, at, sampled, without_copy, unanswered, shed, not_sampled, not_query)
select %(service)s, at, sampled, without_copy, unanswered, shed, not_sampled, not_query
from (
    select at, round(%(sampled)s * end_part) - round(%(sampled)s * start_part) as sampled,
           round(%(without_copy)s * end_part) - round(%(without_copy)s * start_part) as without_copy,
           round(%(unanswered)s * end_part) - round(%(unanswered)s * start_part) as unanswered,
           round(%(shed)s * end_part) - round(%(shed)s * start_part) as shed,
           round(%(not_sampled)s * end_part) - round(%(not_sampled)s * start_part) as not_sampled,
           round(%(not_query)s * end_part) - round(%(not_query)s * start_part) as not_query
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
where sampled > 0 or without_copy <> 0 or unanswered <> 0 or not_sampled > 0
order by at
on conflict (service, at) do update
set sampled = stored.sampled + excluded.sampled, without_copy = stored.without_copy + excluded.without_copy,
    unanswered = stored.unanswered + excluded.unanswered, shed = stored.shed + excluded.shed,
    not_sampled = stored.not_sampled + excluded.not_sampled, not_query = stored.not_query + excluded.not_query

-- name: envoy_peak_rate
-- Return the highest rate of sampled requests in the last seconds, in requests per second.
select coalesce(max(sampled), 0)::float8 / 10 as rate
from abreast.envoy_count
where service = %(service)s and at >= clock_timestamp() - %(seconds)s * interval '1 second'

-- name: shed_copies
-- Return the sampled requests of the last seconds, and the copies of them that would have queued. Steps that began before
-- the last change of the shares do not count.
select coalesce(sum(sampled), 0)::bigint as sampled, coalesce(sum(shed), 0)::bigint as shed
from abreast.envoy_count
where service = %(service)s and at >= %(changed)s and at >= clock_timestamp() - %(seconds)s * interval '1 second'

-- name: effective_sample
-- Return the requests of the last minutes that the shares selected, and those of them with a copy. Requests that a rule
-- excludes by their body do not count.
select coalesce(sum(sampled + not_sampled - not_query), 0)::bigint as selected,
       greatest(coalesce(sum(sampled - without_copy), 0), 0)::bigint as copied
from abreast.envoy_count
where service = %(service)s and at >= clock_timestamp() - %(seconds)s * interval '1 second'

-- name: rule_counts
select key as name, sum(value::bigint)::bigint as count
from abreast.envoy_report cross join lateral jsonb_each_text(totals)
where service = %(service)s and key like 'rule.%%'
group by key

-- name: envoy_sampled
select abreast.envoy_sampled(%(service)s, %(start)s::timestamptz, %(end)s::timestamptz) as sampled
