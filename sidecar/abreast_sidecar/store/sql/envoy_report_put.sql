insert into abreast.envoy_report (node, service, seen, asked, counted, last)
values (%(node)s, %(service)s, clock_timestamp(), %(own)s, %(counted)s::jsonb, %(last)s::jsonb)
on conflict (node, service) do update
set seen = excluded.seen, asked = excluded.asked, counted = excluded.counted, last = excluded.last
