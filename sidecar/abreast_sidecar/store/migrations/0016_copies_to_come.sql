-- Whether a copy's cost is told by copies of the endpoint itself.
alter table abreast.copy_cost add own boolean not null default true;

-- Whether what a copy costs at an endpoint is not known yet, and will be: its times say nothing of new until then. Where
-- copies are so few that `pairs` have passed without enough of them, it is judged by those of its service.
create function abreast.copies_to_come(e abreast.endpoint, pairs bigint) returns boolean stable parallel safe
language sql return
    pairs < 1000 and e.method in ('GET', 'HEAD', 'OPTIONS')
    and exists (select from abreast.traffic t where t.service = e.service and t.baseline_share > 0)
    and not exists (select from abreast.copy_cost k where k.endpoint_id = e.id and k.own);
