-- name: webhook_receivers_add
insert into abreast.webhook_receiver (name) select unnest(%(names)s::text[]) on conflict do nothing

-- name: webhook_receivers_delete
delete from abreast.webhook_receiver where name <> all (%(names)s::text[])

-- name: webhooks_due
select w.id, w.receiver, w.attempts, e.id as event_id, e.uid, e.service, e.at, e.actor, e.action, e.reason, e.before, e.after,
       e.detail
from abreast.webhook_delivery w
join abreast.traffic_event e on e.id = w.event_id
where w.receiver = %(receiver)s and w.due_at <= clock_timestamp()
order by w.id
limit %(limit)s

-- name: webhook_done
with done as (
    delete from abreast.webhook_delivery where id = %(id)s returning receiver
)
update abreast.webhook_receiver r set delivered = r.delivered + 1 from done where r.name = done.receiver

-- name: webhook_retry
with again as (
    update abreast.webhook_delivery
    set attempts = attempts + 1, due_at = clock_timestamp() + %(wait)s * interval '1 second'
    where id = %(id)s
    returning receiver
)
update abreast.webhook_receiver r set failed = r.failed + 1 from again where r.name = again.receiver

-- name: webhooks_trim
-- Give up messages above the limit, oldest first, and messages that are too old. Count them.
with dropped as (
    delete from abreast.webhook_delivery
    where id in (
        select id from (
            select id, row_number() over (partition by receiver order by id desc) as number from abreast.webhook_delivery
        ) as numbered
        where number > %(limit)s
    ) or event_id in (
        select event_id from abreast.webhook_delivery w join abreast.traffic_event e on e.id = w.event_id
        where e.at < clock_timestamp() - %(oldest)s * interval '1 second'
    )
    returning receiver
)
update abreast.webhook_receiver r
set dropped = r.dropped + d.messages
from (select receiver, count(*) as messages from dropped group by receiver) as d
where r.name = d.receiver
returning r.name as receiver, d.messages

-- name: webhook_counts
select coalesce(sum(delivered), 0)::bigint as delivered, coalesce(sum(failed), 0)::bigint as failed,
       coalesce(sum(dropped), 0)::bigint as dropped, (select count(*) from abreast.webhook_delivery) as waiting
from abreast.webhook_receiver
