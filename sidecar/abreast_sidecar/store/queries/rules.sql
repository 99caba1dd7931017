-- name: rules_in_force
-- Return the version even if there are no rules.
select s.version, r.id, r.definition, r.begin_version
from abreast.rule_state s left join abreast.rule r on r.end_version is null
order by r.id

-- name: rules_version_hold
select abreast.hold_rules_version() as version

-- name: rules_version_next
select abreast.next_rules_version() as version

-- name: rules_list
-- `is_applied`: stored pairs reflect the rule, or its end.
select r.*, coalesce(r.end_version, r.begin_version) <= s.applied_version as is_applied,
       (r.end_version is not null and r.expires <= r.ended_at) as is_expired,
       coalesce(hidden.pairs, 0)::bigint as pairs, coalesce(hidden.unknown, 0)::bigint as undetermined_pairs,
       coalesce(hidden.findings, '[]'::jsonb) as findings
from abreast.rule r
cross join abreast.rule_state s
left join lateral (
    select sum(total.pairs) as pairs, sum(total.unknown) as unknown,
           jsonb_agg(jsonb_build_array(total.finding_id, total.pairs, total.unknown) order by total.pairs desc,
                     total.finding_id) filter (where total.number <= %(max_findings)s) as findings
    from (
        select f.finding_id, sum(f.count) as pairs, sum(f.unknown) as unknown,
               row_number() over (order by sum(f.count) desc, f.finding_id) as number
        from abreast.finding_release f
        where f.rule_id = r.id and f.rule_id <> 0
        group by f.finding_id
        having sum(f.count) > 0 or sum(f.unknown) > 0
    ) as total
) as hidden on r.end_version is null
where (%(ids)s::integer[] is null or r.id = any(%(ids)s))
  and (%(source)s::text is null or r.source = %(source)s)
  and (%(include_ended)s or r.end_version is null or (r.expires <= r.ended_at and %(include_expired)s))
  and (%(finding_id)s::bigint = 0
       or exists (select from abreast.finding_release f where f.rule_id = r.id and f.finding_id = %(finding_id)s
                  and (f.count > 0 or f.unknown > 0)))
  and (%(after_id)s::integer is null or r.id > %(after_id)s)
order by r.id
limit %(limit)s

-- name: rule_add
insert into abreast.rule (source, name, definition, owner, reason, expires, created_by, begin_version)
values (%(source)s, %(name)s, %(definition)s, %(owner)s, %(reason)s, %(expires)s, %(actor)s, %(version)s)
returning id

-- name: rules_end
update abreast.rule set end_version = %(version)s, ended_at = clock_timestamp(), ended_by = %(actor)s
where id = any(%(ids)s) and end_version is null
returning id

-- name: rules_expired
-- Expire rules by both clocks: a rule that ended because one clock jumped would not begin again.
select id from abreast.rule where end_version is null and expires <= least(clock_timestamp(), %(sidecar_time)s)

-- name: waivers
-- Return rules in force that waive the coverage of an endpoint.
select id, name, definition, owner, reason, expires
from abreast.rule
where end_version is null and expires > now() and definition->>'action' = 'waive-coverage'
order by id

-- name: preview_counts
select shown.finding, s.old_release, s.new_release, s.old_status, s.new_status, sum(s.pairs)::bigint as pairs
from abreast.hourly_count s
cross join lateral unnest(s.findings) as shown (finding)
where s.endpoint_id in (select endpoint_id from abreast.finding where id = any(%(findings)s::bigint[]))
  and s.findings && %(findings)s::bigint[] and shown.finding = any(%(findings)s::bigint[])
group by 1, 2, 3, 4, 5
having sum(s.pairs) > 0

-- name: preview_examples
select fe.finding_id, x.captures
from abreast.finding f
cross join lateral (
    select * from abreast.finding_example where finding_id = f.id order by body_bytes, day, pair_id limit %(each)s
) as fe
join abreast.example x on x.day = fe.day and x.pair_id = fe.pair_id
where f.id = any(%(findings)s::bigint[])
order by f.count desc, f.id
limit %(limit)s
