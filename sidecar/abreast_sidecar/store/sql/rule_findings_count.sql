insert into abreast.rule_finding as known (
    rule_id, finding_id, old_release, new_release, count, baseline_count, explained, new_greater, new_smaller, unknown
)
select rule_id, id, old_release, new_release, count, baseline_count, explained, new_greater, new_smaller,
       coalesce(unknown, 0)
from json_to_recordset(%(given)s::json) as given (
    rule_id integer, id bigint, old_release integer, new_release integer, count bigint, baseline_count bigint,
    explained bigint, new_greater bigint, new_smaller bigint, unknown bigint
)
order by rule_id, id, old_release, new_release
on conflict (rule_id, finding_id, old_release, new_release) do update
set count = known.count + excluded.count,
    baseline_count = known.baseline_count + excluded.baseline_count,
    explained = known.explained + excluded.explained,
    new_greater = known.new_greater + excluded.new_greater,
    new_smaller = known.new_smaller + excluded.new_smaller,
    unknown = known.unknown + excluded.unknown
