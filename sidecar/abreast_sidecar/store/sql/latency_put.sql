insert into abreast.finding (endpoint_id, part, path, kind, impact, count, first_seen, last_seen, detail)
values (%(endpoint)s, 'latency', '', 'slower', 'value', %(pairs)s, clock_timestamp(), clock_timestamp(), %(detail)s::jsonb)
on conflict (endpoint_id, part, path, kind)
do update set count = excluded.count, last_seen = excluded.last_seen, detail = excluded.detail
