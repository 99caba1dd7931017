-- As before, but of the newest pairs of this endpoint by the index of endpoints: by an equal sign the planner may go through
-- the pairs of all endpoints, back to one that is rare.
create or replace function abreast.copies_to_come(e abreast.endpoint, pairs bigint) returns boolean stable parallel safe
language sql return
    pairs < 1000 and e.method in ('GET', 'HEAD', 'OPTIONS')
    and exists (select from abreast.traffic t where t.service = e.service and t.baseline_share > 0)
    and (
        select coalesce(bool_or(newest.copied), false)
        from (
            select p.copy_us is not null as copied
            from abreast.pair p
            where p.endpoint_id between e.id and e.id
            order by p.endpoint_id desc, p.at desc
            limit 1000
        ) as newest
    );
