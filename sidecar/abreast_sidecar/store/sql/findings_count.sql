update abreast.finding
set count = finding.count + given.count,
    baseline_count = finding.baseline_count + given.baseline_count,
    explained = finding.explained + given.explained,
    new_greater = finding.new_greater + given.new_greater,
    new_smaller = finding.new_smaller + given.new_smaller,
    first_seen = case when finding.count = 0 and given.count > 0 then given.first
                      else least(finding.first_seen, given.first) end,
    last_seen = greatest(finding.last_seen, given.last),
    impact = case when array_position(array['additive', 'value', 'breaking'], given.impact)
                     > array_position(array['additive', 'value', 'breaking'], finding.impact)
                  then given.impact else finding.impact end
from (
    select id, count, baseline_count, explained, new_greater, new_smaller, impact,
           timestamptz 'epoch' + first_ms * interval '1 ms' as first,
           timestamptz 'epoch' + last_ms * interval '1 ms' as last
    from json_to_recordset(%(given)s::json) as given (
        id bigint, count bigint, baseline_count bigint, explained bigint, new_greater bigint, new_smaller bigint,
        impact text, first_ms bigint, last_ms bigint
    )
) as given
where finding.id = given.id
