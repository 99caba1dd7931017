-- The oldest beyond the bound, and what is too old to be news, are given up and counted.
with dropped as (
    delete from abreast.webhook
    where id in (
        select id from (
            select id, row_number() over (partition by url order by id desc) as place from abreast.webhook
        ) as placed
        where place > %(most)s
    ) or event_id in (
        select event_id from abreast.webhook w join abreast.traffic_event e on e.id = w.event_id
        where e.at < clock_timestamp() - %(oldest)s * interval '1 second'
    )
    returning url
)
update abreast.webhook_receiver r
set dropped = r.dropped + d.many
from (select url, count(*) as many from dropped group by url) as d
where r.url = d.url
returning r.url, d.many
