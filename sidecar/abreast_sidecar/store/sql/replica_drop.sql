with dropped as (
    delete from abreast.replica where id = %(id)s returning id
)
select pg_notify('abreast_envoys', '') from dropped
