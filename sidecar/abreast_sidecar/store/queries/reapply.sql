-- name: reapply_state
select abreast.hold_rules_version() as version, queued_version, applied_version,
       exists (select from abreast.reapply_queue) as pending
from abreast.rule_state

-- name: reapply_changed_rules
-- Return rules that began or ended after a version. Rules that did both don't matter.
select id, definition, end_version
from abreast.rule
where (begin_version > %(after)s and end_version is null) or (end_version > %(after)s and begin_version <= %(after)s)
order by id

-- name: reapply_enqueue
insert into abreast.reapply_queue (day, pair_id)
select day, id from abreast.pair where findings <> '{}' and findings && %(findings)s::bigint[]
union
select day, id from abreast.pair where baseline_findings <> '{}' and baseline_findings && %(findings)s::bigint[]
union
select day, id from abreast.pair where explained is not null and explained && %(findings)s::bigint[]
union
select day, id from abreast.pair where explained_by is not null and explained_by && %(rules)s::integer[]
union
select day, id from abreast.pair where baseline_explained_by is not null
  and baseline_explained_by && %(rules)s::integer[]
union
select p.day, p.id -- pairs without stored responses that name a later rule
from abreast.pair p
where p.findings <> '{}' and p.findings && array(
    select finding_id
    from abreast.finding_release
    where rule_id <> 0 and rule_id = any(%(rules)s::integer[]) and unknown > 0
)
on conflict do nothing

-- name: reapply_enqueued
update abreast.rule_state set queued_version = %(version)s

-- name: reapply_take
with batch as (
    delete from abreast.reapply_queue
    where (day, pair_id) in (select day, pair_id from abreast.reapply_queue order by day, pair_id limit %(limit)s)
    returning day, pair_id
)
select p.day, p.id, p.at, p.outcome, p.old_status, p.new_status, p.old_us, p.new_us, p.old_release, p.new_release,
       p.findings, p.baseline_findings, p.explained, p.explained_by, p.baseline_explained, p.baseline_explained_by,
       p.reason, p.rules_version, p.drift, p.marks,
       e.id as endpoint_id, e.service, e.method, e.route, x.captures
from batch t
join abreast.pair p on p.day = t.day and p.id = t.pair_id
join abreast.endpoint e on e.id = p.endpoint_id
left join abreast.example x on x.day = t.day and x.pair_id = t.pair_id
order by p.id, p.day

-- name: reapply_findings
select f.id, f.endpoint_id, f.part, f.path, f.kind, f.impact, f.status, e.service, e.method, e.route
from abreast.finding f join abreast.endpoint e on e.id = f.endpoint_id
where (%(ids)s::bigint[] is null or f.id = any(%(ids)s)) and not abreast.is_aggregate(f)

-- name: reapply_pairs_set
update abreast.pair p
set findings = coalesce(g.findings, '{}'), explained = g.explained, explained_by = g.explained_by,
    baseline_findings = coalesce(g.baseline_findings, '{}'), baseline_explained = g.baseline_explained,
    baseline_explained_by = g.baseline_explained_by,
    outcome = g.outcome, reason = g.reason, rules_version = g.rules_version, marks = g.marks
from json_to_recordset(%(rows)s::json) as g (
    day date, id text, findings bigint[], explained bigint[], explained_by integer[], baseline_findings bigint[],
    baseline_explained bigint[], baseline_explained_by integer[], outcome text, reason text, rules_version bigint,
    marks jsonb
)
where p.day = g.day and p.id = g.id

-- name: reapply_examples_set
update abreast.example x
set differences = g.differences
from json_to_recordset(%(rows)s::json) as g (day date, id text, differences jsonb)
where x.day = g.day and x.pair_id = g.id

-- name: reapply_totals
-- Return counters of findings by releases, with the labels of the releases: those that no rule explains (rule 0), and
-- those of ended rules.
select s.rule_id, s.finding_id, s.old_release, s.new_release, s.count, s.baseline_count, s.shape_explained,
       s.copy_greater_of_new, s.copy_smaller_of_new, s.repeat_checks, s.old_repeats, s.new_repeats, s.other_above,
       s.other_below, s.same_above, s.same_below, s.same_rises, s.same_falls, s.other_only, s.same_only, s.copy_greater_of_old,
       s.copy_smaller_of_old, coalesce(n.label, '') as new_label, f.last_seen
from abreast.finding_release s
join abreast.finding f on f.id = s.finding_id
left join abreast.release n on n.id = s.new_release
where (s.count > 0 or s.baseline_count > 0)
  and ((s.rule_id = 0 and s.finding_id = any(%(findings)s))
       or s.rule_id in (select id from abreast.rule where end_version <= %(version)s))

-- name: reapply_finish
update abreast.rule_state set applied_version = queued_version
