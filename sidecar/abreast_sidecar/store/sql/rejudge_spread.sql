-- What is counted of findings by releases, with the releases' labels.
select s.finding_id, s.old_release, s.new_release, coalesce(n.label, '') as new_label,
       s.rule_id, s.count, s.baseline_count, s.explained, s.new_greater, s.new_smaller, f.last_seen
from (
    select 0 as rule_id, finding_id, old_release, new_release, count, baseline_count, explained, new_greater, new_smaller
    from abreast.finding_release
    where finding_id = any(%(findings)s)
    union all
    select rule_id, finding_id, old_release, new_release, count, baseline_count, explained, new_greater, new_smaller
    from abreast.rule_finding
    where rule_id in (select id from abreast.rule where ended <= %(listed)s)
) as s
join abreast.finding f on f.id = s.finding_id
left join abreast.release n on n.id = s.new_release
where s.count > 0 or s.baseline_count > 0
