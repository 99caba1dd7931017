-- Findings of the endpoints whose counts changed, with what theirs are held against; without those that tests of their
-- own found. Those that begin with `newest` are of the latest release in which the finding was seen, copies of all pairs
-- with that release of old.
select e.id as endpoint, e.compared, e.baseline_compared, f.id, f.part, f.path, f.kind, f.count, f.baseline_count,
       f.explained, f.new_greater, f.new_smaller, f.turns, f.old_again, f.new_again, f.far_more, f.far_less,
       f.copies_far_more, f.copies_far_less, f.state, f.reason,
       newest.old_release, newest.new_release, newest.label as newest_label, newest.compared as newest_compared,
       newest.count as newest_count, newest.explained as newest_explained, newest.new_greater as newest_new_greater,
       newest.new_smaller as newest_new_smaller, newest.turns as newest_turns, newest.old_again as newest_old_again,
       newest.new_again as newest_new_again, newest.far_more as newest_far_more, newest.far_less as newest_far_less,
       copies.copies_far_more as newest_copies_far_more, copies.copies_far_less as newest_copies_far_less,
       copies.baseline_count as newest_baseline_count, copies.baseline_compared as newest_baseline_compared
from abreast.endpoint e
left join abreast.finding f on f.endpoint_id = e.id and not abreast.of_no_pair(f)
left join lateral (
    select s.*, c.compared, r.label
    from abreast.finding_release s
    join abreast.endpoint_release c
        on c.endpoint_id = e.id and c.old_release = s.old_release and c.new_release = s.new_release
    left join abreast.release r on r.id = s.new_release
    where s.finding_id = f.id and s.count > 0
    order by s.new_release desc, s.old_release desc
    limit 1
) as newest on true
left join lateral (
    select shown.*,
           (
               select coalesce(sum(baseline_compared), 0)::bigint
               from abreast.endpoint_release
               where endpoint_id = e.id and old_release = newest.old_release
           ) as baseline_compared
    from (
        select coalesce(sum(baseline_count), 0)::bigint as baseline_count,
               coalesce(sum(copies_far_more), 0)::bigint as copies_far_more,
               coalesce(sum(copies_far_less), 0)::bigint as copies_far_less
        from abreast.finding_release
        where finding_id = f.id and old_release = newest.old_release
    ) as shown
) as copies on newest.old_release is not null
where (e.compared, e.baseline_compared) <> (e.judged_compared, e.judged_baseline)
order by e.id, f.id
