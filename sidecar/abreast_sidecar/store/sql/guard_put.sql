-- A policy that is set begins anew: evidence from before, and its cool-down, are forgotten.
insert into abreast.guard (service, policy)
values (%(service)s, %(policy)s)
on conflict (service) do update set policy = excluded.policy, since = clock_timestamp(), fired = '{}', state = 'waiting',
    said = '', looked_at = null
returning service, policy, since, fired, state, said, looked_at, clock_timestamp() as now
