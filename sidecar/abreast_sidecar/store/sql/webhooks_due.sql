select w.id, w.url, w.attempts, e.id as event_id, e.uid, e.service, e.at, e.actor, e.action, e.reason, e.before, e.after,
       e.detail
from abreast.webhook w
join abreast.traffic_event e on e.id = w.event_id
where w.url = %(url)s and w.due <= clock_timestamp()
order by w.id
limit %(most)s
