-- name: traffic_read
-- After a clock was set back, `updated_at` may be in the future.
select service, version, updated_at, new_share, sample_safe, sample_unsafe, baseline_share, rolled_back,
       greatest(extract(epoch from clock_timestamp() - updated_at), 0)::float8 as age
from abreast.traffic
where %(service)s::text is null or service = %(service)s
order by service

-- name: service_exists
-- Check that an Envoy or a capture has named the service.
select exists (select from abreast.traffic where service = %(service)s)
    or exists (select from abreast.endpoint where service = %(service)s)
    or exists (select from abreast.process_report where service = %(service)s)
    or exists (select from abreast.envoy_report where service = %(service)s) as named

-- name: traffic_create
with seeded as (
    insert into abreast.traffic (service, new_share, sample_safe, sample_unsafe, baseline_share, updated_at)
    values (%(service)s, %(new_share)s, %(sample_safe)s, %(sample_unsafe)s, %(baseline_share)s, clock_timestamp())
    on conflict do nothing
    returning service
)
select service from seeded

-- name: traffic_lock
select service, version, updated_at, new_share, sample_safe, sample_unsafe, baseline_share, rolled_back,
       0::float8 as age
from abreast.traffic
where service = %(service)s
for update

-- name: traffic_update
-- Times of a service stay in order even if the clock was set back.
update abreast.traffic
set version = version + 1,
    new_share = %(new_share)s,
    sample_safe = %(sample_safe)s,
    sample_unsafe = %(sample_unsafe)s,
    baseline_share = %(baseline_share)s,
    rolled_back = %(rolled_back)s,
    updated_at = greatest(clock_timestamp(), updated_at + interval '1 microsecond')
where service = %(service)s
returning service, version, updated_at, new_share, sample_safe, sample_unsafe, baseline_share, rolled_back,
          0::float8 as age

-- name: traffic_event_add
select abreast.record_event(%(service)s, coalesce(%(at)s::timestamptz, clock_timestamp()), %(actor)s, %(action)s,
       %(reason)s, %(before)s, %(after)s, %(detail)s)

-- name: traffic_events
select id, at, actor, action, reason, before, after, detail
from abreast.traffic_event
where service = %(service)s and (%(before_id)s::bigint is null or id < %(before_id)s)
order by id desc
limit %(limit)s

-- name: rollback_recorded
-- Check that this or another sidecar has recorded the call.
select id
from abreast.traffic_event
where service = %(service)s and after ->> 'call' = %(call)s
limit 1
