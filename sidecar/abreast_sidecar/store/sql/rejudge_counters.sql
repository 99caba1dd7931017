-- Of findings under their locks: their own counters (rule 0), and what rules hide of them.
select 0 as rule_id, finding_id, old_release, new_release, count, baseline_count, explained, new_greater, new_smaller
from abreast.finding_release where finding_id = any(%(ids)s)
union all
select rule_id, finding_id, old_release, new_release, count, baseline_count, explained, new_greater, new_smaller
from abreast.rule_finding where finding_id = any(%(ids)s)
