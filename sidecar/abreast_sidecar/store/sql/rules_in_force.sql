-- With the version, also where there are none.
select s.version, r.id, r.definition, r.began
from abreast.rule_state s left join abreast.rule r on r.ended is null
order by r.id
