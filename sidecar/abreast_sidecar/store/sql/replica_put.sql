-- One that begins takes the place of the one that was killed at its address.
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
