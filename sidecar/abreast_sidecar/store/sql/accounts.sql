-- By service: what Envoys counted, rows ever written, and what became of captures in Redis, over all time.
select s.service, e.sampled as envoy_sampled, coalesce(e.not_sent, 0) as not_sent, coalesce(t.written, 0) as written,
       coalesce(r.received, 0) as received, coalesce(r.duplicate, 0) as duplicate, coalesce(r.late, 0) as late,
       coalesce(r.joined, 0) as joined, coalesce(r.swept, 0) as swept, coalesce(p.poison, 0) as poison
from (
    select service from abreast.envoy_report
    union select service from abreast.tally
    union select service from abreast.shard_report
    union select %(service)s::text where %(service)s::text is not null
) as s
left join lateral (
    select sum((counted->>'sampled')::bigint)::bigint as sampled, sum((counted->>'not_sent')::bigint)::bigint as not_sent
    from abreast.envoy_report where envoy_report.service = s.service
) as e on true
left join lateral (
    select sum(pairs)::bigint as written from abreast.tally where tally.service = s.service
) as t on true
left join lateral (
    select sum((report->>'received')::bigint)::bigint as received,
           sum((report->>'duplicate')::bigint)::bigint as duplicate,
           sum((report->>'late')::bigint)::bigint as late,
           sum((report->>'joined')::bigint)::bigint as joined,
           sum((report->>'swept')::bigint)::bigint as swept
    from abreast.shard_report where shard_report.service = s.service
) as r on true
left join lateral (
    select count(*) as poison from abreast.poison where poison.service = s.service
) as p on true
where %(service)s::text is null or s.service = %(service)s
order by s.service
