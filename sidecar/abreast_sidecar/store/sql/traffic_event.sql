with written as (
    insert into abreast.traffic_event (service, at, actor, action, reason, before, after)
    values (%(service)s, %(at)s, %(actor)s, %(action)s, %(reason)s, %(before)s, %(after)s)
)
select pg_notify('abreast_traffic', %(service)s)
