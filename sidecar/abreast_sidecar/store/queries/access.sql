-- name: tokens_read
select name, scopes, services, node, creator, created_at as create_time, expires_at as expire_time,
       revoked_at as revoke_time, digest
from abreast.token order by id limit %(limit)s

-- name: tokens_list
select id, name, scopes, services, node, creator, created_at as create_time, expires_at as expire_time,
       revoked_at as revoke_time, digest
from abreast.token
where %(before_id)s::bigint is null or id < %(before_id)s
order by id desc
limit %(limit)s

-- name: token_create
-- Return no row if the name is taken or there are too many tokens.
insert into abreast.token (name, scopes, services, node, creator, expires_at, digest)
select %(name)s, %(scopes)s::text[], %(services)s::text[], %(node)s, %(creator)s, %(expire_time)s::timestamptz, %(digest)s
where (select count(*) from abreast.token) < %(limit)s
on conflict do nothing
returning name, scopes, services, node, creator, created_at as create_time, expires_at as expire_time,
          revoked_at as revoke_time, digest

-- name: token_revoke
-- A repeated call keeps the time of the first one.
update abreast.token set revoked_at = coalesce(revoked_at, clock_timestamp()) where name = %(name)s
returning name, scopes, services, node, creator, created_at as create_time, expires_at as expire_time,
          revoked_at as revoke_time, digest

-- name: audit_add
insert into abreast.audit_event (actor, peer, action, service, target)
values (%(actor)s, %(peer)s, %(action)s, %(service)s, %(target)s)

-- name: audit_list
select id, at as time, actor, peer, action, service, target
from abreast.audit_event
where (%(before_id)s::bigint is null or id < %(before_id)s)
  and (%(actor)s = '' or actor = %(actor)s)
  and (%(start)s::timestamptz is null or at >= %(start)s)
  and (%(end)s::timestamptz is null or at < %(end)s)
order by id desc
limit %(limit)s

-- name: audit_expire
delete from abreast.audit_event where at < %(oldest)s

-- name: finding_service
select e.service from abreast.finding f join abreast.endpoint e on e.id = f.endpoint_id where f.id = %(id)s

-- name: pair_service
select e.service from abreast.pair p join abreast.endpoint e on e.id = p.endpoint_id where p.id = %(id)s limit 1
