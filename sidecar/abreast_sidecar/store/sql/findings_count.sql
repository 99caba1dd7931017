-- A finding that was said to be fixed and shows up in a later release is open again, and says so; its row is locked, so
-- that this happens once. Without labels, what arrived after it was said to be fixed is later.
with given as (
    select id, old_release, new_release, count, baseline_count, explained, new_greater, new_smaller,
           coalesce(turns, 0) as turns, coalesce(old_again, 0) as old_again, coalesce(new_again, 0) as new_again,
           coalesce(far_more, 0) as far_more, coalesce(far_less, 0) as far_less,
           coalesce(copies_far_more, 0) as copies_far_more, coalesce(copies_far_less, 0) as copies_far_less,
           array_position(array['additive', 'value', 'breaking'], impact) as severity,
           timestamptz 'epoch' + first_ms * interval '1 ms' as first,
           timestamptz 'epoch' + last_ms * interval '1 ms' as last
    from json_to_recordset(%(given)s::json) as given (
        id bigint, old_release integer, new_release integer, count bigint, baseline_count bigint, explained bigint,
        new_greater bigint, new_smaller bigint, turns bigint, old_again bigint, new_again bigint,
        far_more bigint, far_less bigint, copies_far_more bigint, copies_far_less bigint, impact text, first_ms bigint,
        last_ms bigint
    )
),
total as (
    select id, sum(count) as count, sum(baseline_count) as baseline_count, sum(explained) as explained,
           sum(new_greater) as new_greater, sum(new_smaller) as new_smaller,
           sum(turns) as turns, sum(old_again) as old_again, sum(new_again) as new_again,
           sum(far_more) as far_more, sum(far_less) as far_less, sum(copies_far_more) as copies_far_more,
           sum(copies_far_less) as copies_far_less, max(severity) as severity,
           min(first) as first, max(last) as last
    from given
    group by id
),
back as (
    select distinct on (f.id) f.id, r.label
    from given g
    join abreast.finding f on f.id = g.id
    join abreast.release r on r.id = g.new_release
    where f.status = 'fixed' and g.count > 0
      and (r.id > f.fixed_after or (r.label = '' and g.last > f.status_since))
    order by f.id, r.id desc
),
told as (
    insert into abreast.finding_event (finding_id, actor, before, after, release, reason)
    select id, 'abreast', 'fixed', 'reopened', label, 'seen again'
    from back
),
by_release as (
    insert into abreast.finding_release as known (
        finding_id, old_release, new_release, count, baseline_count, explained, new_greater, new_smaller, turns, old_again,
        new_again, far_more, far_less, copies_far_more, copies_far_less, first_seen, last_seen
    )
    select id, old_release, new_release, count, baseline_count, explained, new_greater, new_smaller, turns, old_again,
           new_again, far_more, far_less, copies_far_more, copies_far_less, first, last
    from given
    order by id, old_release, new_release
    on conflict (finding_id, old_release, new_release) do update
    set count = known.count + excluded.count,
        baseline_count = known.baseline_count + excluded.baseline_count,
        explained = known.explained + excluded.explained,
        new_greater = known.new_greater + excluded.new_greater,
        new_smaller = known.new_smaller + excluded.new_smaller,
        turns = known.turns + excluded.turns,
        old_again = known.old_again + excluded.old_again,
        new_again = known.new_again + excluded.new_again,
        far_more = known.far_more + excluded.far_more,
        far_less = known.far_less + excluded.far_less,
        copies_far_more = known.copies_far_more + excluded.copies_far_more,
        copies_far_less = known.copies_far_less + excluded.copies_far_less,
        first_seen = least(known.first_seen, excluded.first_seen),
        last_seen = greatest(known.last_seen, excluded.last_seen)
)
update abreast.finding
set count = finding.count + total.count,
    baseline_count = finding.baseline_count + total.baseline_count,
    explained = finding.explained + total.explained,
    new_greater = finding.new_greater + total.new_greater,
    new_smaller = finding.new_smaller + total.new_smaller,
    turns = finding.turns + total.turns,
    old_again = finding.old_again + total.old_again,
    new_again = finding.new_again + total.new_again,
    far_more = finding.far_more + total.far_more,
    far_less = finding.far_less + total.far_less,
    copies_far_more = finding.copies_far_more + total.copies_far_more,
    copies_far_less = finding.copies_far_less + total.copies_far_less,
    first_seen = case when finding.count = 0 and total.count > 0 then total.first
                      else least(finding.first_seen, total.first) end,
    last_seen = greatest(finding.last_seen, total.last),
    impact = case when total.severity > array_position(array['additive', 'value', 'breaking'], finding.impact)
                  then (array['additive', 'value', 'breaking'])[total.severity] else finding.impact end,
    status = case when back.id is null then finding.status else 'reopened' end,
    status_since = case when back.id is null then finding.status_since else clock_timestamp() end
from total left join back using (id)
where finding.id = total.id
