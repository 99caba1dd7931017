with taken as (
    delete from abreast.rejudge
    where (day, pair_id) in (select day, pair_id from abreast.rejudge order by day, pair_id limit %(limit)s)
    returning day, pair_id
)
select p.day, p.id, p.at, p.outcome, p.old_status, p.new_status, p.old_us, p.new_us, p.old_release, p.new_release,
       p.findings, p.noise, p.explained, p.explained_by, p.noise_explained, p.noise_explained_by, p.reason, p.rules, p.drift,
       e.id as endpoint_id, e.service, e.method, e.route, x.captures
from taken t
join abreast.pair p on p.day = t.day and p.id = t.pair_id
join abreast.endpoint e on e.id = p.endpoint_id
left join abreast.example x on x.day = t.day and x.pair_id = t.pair_id
order by p.id, p.day
