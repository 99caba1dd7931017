-- name: webhook_receivers_add
insert into abreast.webhook_receiver (url) select unnest(%(urls)s::text[]) on conflict do nothing

-- name: webhook_receivers_delete
delete from abreast.webhook_receiver where url <> all (%(urls)s::text[])

-- name: webhooks_due
select w.id, w.url, w.attempts, e.id as event_id, e.uid, e.service, e.at, e.actor, e.action, e.reason, e.before, e.after,
       e.detail
from abreast.webhook_delivery w
join abreast.traffic_event e on e.id = w.event_id
where w.url = %(url)s and w.due_at <= clock_timestamp()
order by w.id
limit %(limit)s

-- name: webhook_done
with done as (
    delete from abreast.webhook_delivery where id = %(id)s returning url
)
update abreast.webhook_receiver r set delivered = r.delivered + 1 from done where r.url = done.url

-- name: webhook_retry
with again as (
    update abreast.webhook_delivery
    set attempts = attempts + 1, due_at = clock_timestamp() + %(wait)s * interval '1 second'
    where id = %(id)s
    returning url
)
update abreast.webhook_receiver r set failed = r.failed + 1 from again where r.url = again.url

-- name: webhooks_trim
-- Give up messages above the limit, oldest first, and messages that are too old. Count them.
with dropped as (
    delete from abreast.webhook_delivery
    where id in (
        select id from (
            select id, row_number() over (partition by url order by id desc) as number from abreast.webhook_delivery
        ) as numbered
        where number > %(limit)s
    ) or event_id in (
        select event_id from abreast.webhook_delivery w join abreast.traffic_event e on e.id = w.event_id
        where e.at < clock_timestamp() - %(oldest)s * interval '1 second'
    )
    returning url
)
update abreast.webhook_receiver r
set dropped = r.dropped + d.messages
from (select url, count(*) as messages from dropped group by url) as d
where r.url = d.url
returning r.url, d.messages

-- name: webhook_counts
select coalesce(sum(delivered), 0)::bigint as delivered, coalesce(sum(failed), 0)::bigint as failed,
       coalesce(sum(dropped), 0)::bigint as dropped, (select count(*) from abreast.webhook_delivery) as waiting
from abreast.webhook_receiver
