-- `rejudged`: what is stored is judged by it, or without it where it ended.
select r.*, coalesce(r.ended, r.began) <= s.judged as rejudged,
       (r.ended is not null and r.expires <= r.ended_at) as expired,
       coalesce(hidden.pairs, 0)::bigint as pairs, coalesce(hidden.unknown, 0)::bigint as unknown,
       coalesce(hidden.findings, '[]'::jsonb) as findings
from abreast.rule r
cross join abreast.rule_state s
left join lateral (
    select sum(of_one.pairs) as pairs, sum(of_one.unknown) as unknown,
           jsonb_agg(jsonb_build_array(of_one.finding_id, of_one.pairs, of_one.unknown) order by of_one.pairs desc,
                     of_one.finding_id) filter (where of_one.place <= %(most)s) as findings
    from (
        select f.finding_id, sum(f.count) as pairs, sum(f.unknown) as unknown,
               row_number() over (order by sum(f.count) desc, f.finding_id) as place
        from abreast.rule_finding f
        where f.rule_id = r.id
        group by f.finding_id
        having sum(f.count) > 0 or sum(f.unknown) > 0
    ) as of_one
) as hidden on r.ended is null
where (%(ids)s::integer[] is null or r.id = any(%(ids)s))
  and (%(source)s::text is null or r.source = %(source)s)
  and (%(include_ended)s or r.ended is null or (r.expires <= r.ended_at and %(include_expired)s))
  and (%(finding_id)s::bigint = 0
       or exists (select from abreast.rule_finding f where f.rule_id = r.id and f.finding_id = %(finding_id)s
                  and (f.count > 0 or f.unknown > 0)))
  and (%(after_id)s::integer is null or r.id > %(after_id)s)
order by r.id
limit %(limit)s
