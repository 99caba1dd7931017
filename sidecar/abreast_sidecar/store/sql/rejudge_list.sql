insert into abreast.rejudge (day, pair_id)
select day, id from abreast.pair where findings <> '{}' and findings && %(findings)s::bigint[]
union
select day, id from abreast.pair where noise <> '{}' and noise && %(findings)s::bigint[]
union
select day, id from abreast.pair where explained is not null and explained && %(findings)s::bigint[]
union
select day, id from abreast.pair where explained_by is not null and explained_by && %(rules)s::integer[]
union
select day, id from abreast.pair where noise_explained_by is not null and noise_explained_by && %(rules)s::integer[]
union
select p.day, p.id -- those that name a rule which came too late for them
from abreast.pair p
where p.findings <> '{}' and p.findings && array(
    select finding_id from abreast.rule_finding where rule_id = any(%(rules)s::integer[]) and unknown > 0
)
on conflict do nothing
