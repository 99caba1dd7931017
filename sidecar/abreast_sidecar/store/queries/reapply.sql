-- name: rejudge_state
select abreast.hold_rules() as version, listed, judged, exists (select from abreast.rejudge) as pending
from abreast.rule_state

-- name: rejudge_changed
-- Return rules that began or ended after a version. Rules that did both don't matter.
select id, definition, ended
from abreast.rule
where (began > %(after)s and ended is null) or (ended > %(after)s and began <= %(after)s)
order by id

-- name: rejudge_list
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

-- name: rejudge_listed
update abreast.rule_state set listed = %(version)s

-- name: rejudge_take
with taken as (
    delete from abreast.rejudge
    where (day, pair_id) in (select day, pair_id from abreast.rejudge order by day, pair_id limit %(limit)s)
    returning day, pair_id
)
select p.day, p.id, p.at, p.outcome, p.old_status, p.new_status, p.old_us, p.new_us, p.old_release, p.new_release,
       p.findings, p.noise, p.explained, p.explained_by, p.noise_explained, p.noise_explained_by, p.reason, p.rules, p.drift,
       e.id as endpoint_id, e.service, e.method, e.route, x.captures
from taken t
join abreast.pair p on p.day = t.day and p.id = t.pair_id
join abreast.endpoint e on e.id = p.endpoint_id
left join abreast.example x on x.day = t.day and x.pair_id = t.pair_id
order by p.id, p.day

-- name: rejudge_findings
select f.id, f.endpoint_id, f.part, f.path, f.kind, f.impact, f.status, e.service, e.method, e.route
from abreast.finding f join abreast.endpoint e on e.id = f.endpoint_id
where (%(ids)s::bigint[] is null or f.id = any(%(ids)s)) and not abreast.of_no_pair(f)

-- name: rejudge_pairs
update abreast.pair p
set findings = coalesce(g.findings, '{}'), explained = g.explained, explained_by = g.explained_by,
    noise = coalesce(g.noise, '{}'), noise_explained = g.noise_explained, noise_explained_by = g.noise_explained_by,
    outcome = g.outcome, reason = g.reason, rules = g.rules
from json_to_recordset(%(given)s::json) as g (
    day date, id text, findings bigint[], explained bigint[], explained_by integer[], noise bigint[],
    noise_explained bigint[], noise_explained_by integer[], outcome text, reason text, rules bigint
)
where p.day = g.day and p.id = g.id

-- name: rejudge_examples
update abreast.example x
set differences = g.differences
from json_to_recordset(%(given)s::json) as g (day date, id text, differences jsonb)
where x.day = g.day and x.pair_id = g.id

-- name: rejudge_counters
-- Return counters of locked findings: their own (rule 0), and those that rules explain.
select 0 as rule_id, finding_id, old_release, new_release, count, baseline_count, explained, new_greater, new_smaller
from abreast.finding_release where finding_id = any(%(ids)s)
union all
select rule_id, finding_id, old_release, new_release, count, baseline_count, explained, new_greater, new_smaller
from abreast.rule_finding where finding_id = any(%(ids)s)

-- name: rejudge_spread
-- Return counters of findings by releases, with the labels of the releases.
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

-- name: rejudge_judged
update abreast.rule_state set judged = listed
