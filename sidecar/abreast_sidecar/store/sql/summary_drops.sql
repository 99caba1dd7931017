select place, reason, sum(count)::bigint as count
from (
    select 'service' as place, d.key as reason, d.value::bigint as count
    from abreast.process_report r cross join lateral jsonb_each_text(coalesce(r.report->'dropped', '{}')) d
    where r.service = %(service)s
    union all
    select 'service', 'late_effects', coalesce((r.report->>'late_effects')::bigint, 0)
    from abreast.process_report r
    where r.service = %(service)s
    union all
    select 'redis', c.key, c.value::bigint
    from abreast.shard_report r cross join lateral jsonb_each_text(r.report) c
    where r.service = %(service)s and c.key like 'shed\_%%'
) drops
where count > 0
group by place, reason
order by place, reason
