-- The clock may be set back; the states of a service stay in order all the same.
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
