-- name: traffic_read
-- After a clock was set back, `updated_at` may be in the future.
-- `known` is {service: revision}, of the settings that this sidecar has.
select service, version, updated_at, new_share, sample_safe, sample_unsafe, baseline_share, rolled_back, conflict,
       drill_share, drill_delay_ms, drill_s, drill_by_header, rule_shares, revision,
       greatest(extract(epoch from clock_timestamp() - updated_at), 0)::float8 as age,
       abreast.includes_revision(t, %(known)s::jsonb ->> service) as includes_known
from abreast.traffic t
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
select service, version, updated_at, new_share, sample_safe, sample_unsafe, baseline_share, rolled_back, conflict,
       drill_share, drill_delay_ms, drill_s, drill_by_header, rule_shares, revision
from abreast.traffic
where service = %(service)s
for update

-- name: traffic_includes
select abreast.includes_revision(t, %(known)s) as included from abreast.traffic t where service = %(service)s

-- name: traffic_update
-- Times of a service stay in order even if the clock was set back.
update abreast.traffic
set version = version + 1,
    new_share = %(new_share)s,
    sample_safe = %(sample_safe)s,
    sample_unsafe = %(sample_unsafe)s,
    baseline_share = %(baseline_share)s,
    rolled_back = %(rolled_back)s,
    conflict = %(conflict)s,
    drill_share = %(drill_share)s,
    drill_delay_ms = %(drill_delay_ms)s,
    drill_s = %(drill_s)s,
    drill_by_header = %(drill_by_header)s,
    rule_shares = %(rule_shares)s::jsonb,
    revision = coalesce(%(revision)s, gen_random_uuid()::text),
    updated_at = greatest(clock_timestamp(), updated_at + interval '1 microsecond')
where service = %(service)s
returning service, version, updated_at, new_share, sample_safe, sample_unsafe, baseline_share, rolled_back, conflict,
          drill_share, drill_delay_ms, drill_s, drill_by_header, rule_shares, revision

-- name: traffic_event_add
select abreast.record_event(%(service)s, coalesce(%(at)s::timestamptz, clock_timestamp()), %(actor)s, %(action)s,
       %(reason)s, %(before)s, %(after)s, %(detail)s)

-- name: traffic_events
select id, at, actor, action, reason, before, after, detail
from abreast.traffic_event
where service = %(service)s and (%(before_id)s::bigint is null or id < %(before_id)s)
order by id desc
limit %(limit)s

-- name: drill_counts
-- Return what Envoys counted since their start, null if no sidecar reads them.
select sum((totals->>'responses')::bigint)::bigint as responses,
       sum((totals->>'server_errors')::bigint)::bigint as server_errors,
       sum((totals->>'faults')::bigint)::bigint as faults
from abreast.envoy_report where service = %(service)s

-- name: drill_passed
-- Check that a drill has passed with the newest release of new.
select exists (
    select from abreast.traffic_event
    where service = %(service)s and action = 'drill_end' and detail->>'passed' = 'true'
      and at > coalesce(
          (
              select coalesce(max(first_seen) filter (where label <> ''), max(first_seen))
              from abreast.release where service = %(service)s and version = 'new'
          ),
          '-infinity'
      )
) as passed

-- name: rollbacks_recorded
-- The revision of a rollback is the id of its call.
select after ->> 'revision' as call from abreast.traffic_event where action = 'rollback'

-- name: control_key
select key from abreast.control_key
