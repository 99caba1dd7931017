insert into abreast.envoy_report (node, service, seen, counted, last)
values (%(node)s, %(service)s, clock_timestamp(), %(counted)s::jsonb, %(last)s::jsonb)
on conflict (node, service) do update set seen = excluded.seen, counted = excluded.counted, last = excluded.last
