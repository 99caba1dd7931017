with seeded as (
    insert into abreast.traffic (service, new_share, sample_safe, sample_unsafe, baseline_share, updated_at)
    values (%(service)s, %(new_share)s, %(sample_safe)s, %(sample_unsafe)s, %(baseline_share)s, clock_timestamp())
    on conflict do nothing
    returning service
)
select service from seeded
