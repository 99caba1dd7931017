-- Whether copies of old are to be expected at an endpoint that has so many pairs: until there are enough, its times say nothing
-- of new. Where so many pairs have passed without enough of them, they are judged without.
create function abreast.copies_to_come(e abreast.endpoint, pairs bigint) returns boolean stable parallel safe
language sql return
    pairs < 1000 and e.method in ('GET', 'HEAD', 'OPTIONS')
    and exists (select from abreast.traffic t where t.service = e.service and t.baseline_share > 0);
