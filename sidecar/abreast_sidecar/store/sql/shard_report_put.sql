insert into abreast.shard_report (service, shard, seen, report)
values (%(service)s, %(shard)s, clock_timestamp(), %(report)s::jsonb)
on conflict (service, shard) do update set seen = excluded.seen, report = excluded.report
