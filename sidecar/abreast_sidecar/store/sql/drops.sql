-- Captures that were lost, over all time. What Redis refuses is counted there and by the process that had sent it. Either
-- may know of more, a Redis that outlived the process or a process that outlived the Redis, so the larger one is shown.
with told as (
    select r.service, d.key, d.value
    from abreast.process_report r
    cross join lateral jsonb_each_text(
        case jsonb_typeof(r.report->'dropped') when 'object' then r.report->'dropped' else '{}' end
    ) as d
    union all
    select service, 'late_effects', report->>'late_effects' from abreast.process_report
    union all
    select r.service, c.key, c.value
    from abreast.shard_report r cross join lateral jsonb_each_text(r.report) as c
    where c.key like 'shed\_%%'
    union all
    select service, 'day_dropped', entries::text from abreast.late
),
counted as (
    select service, key, sum(value::bigint)::bigint as count
    from told
    where value ~ '^[0-9]{1,15}$' and (%(service)s::text is null or service = %(service)s)
    group by service, key
)
select service, case when key ~ '^(shed|refused)_' then 'redis' when key = 'day_dropped' then 'ledger' else 'service' end as place,
       replace(key, 'refused_', 'shed_') as reason, max(count) as count
from counted
where count > 0
group by 1, 2, 3
order by 1, 2, 3
