with again as (
    update abreast.webhook
    set attempts = attempts + 1, due = clock_timestamp() + %(wait)s * interval '1 second'
    where id = %(id)s
    returning url
)
update abreast.webhook_receiver r set failed = r.failed + 1 from again where r.url = again.url
