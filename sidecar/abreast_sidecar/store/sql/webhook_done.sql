with done as (
    delete from abreast.webhook where id = %(id)s returning url
)
update abreast.webhook_receiver r set delivered = r.delivered + 1 from done where r.url = done.url
