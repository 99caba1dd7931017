select p.day, p.id, p.at, e.service, e.method, e.route, p.outcome, p.live, p.request, p.old_status, p.new_status,
       p.old_us, p.new_us, p.old_release, p.new_release, p.findings, p.reason, p.explained, p.explained_by, p.drift,
       x.captures, x.differences,
       array(
           select n.part || ' ' || n.kind || ' ' || n.path
           from abreast.finding n
           where n.endpoint_id = p.endpoint_id and n.state = 'noise'
       ) as noisy,
       array(
           select n.part || ' ' || n.kind || ' ' || n.path from abreast.finding n where n.id = any(p.drift)
       ) as drifted
from abreast.pair p
join abreast.endpoint e on e.id = p.endpoint_id
left join abreast.example x on x.day = p.day and x.pair_id = p.id
where p.id = %(id)s
order by p.day desc
limit 1
