-- A test of its own found it: its state is never decided from counts.
insert into abreast.finding (endpoint_id, part, path, kind, impact, count, first_seen, last_seen, state, reason, detail)
values (%(endpoint)s, 'cache', 'misses', 'changed', 'value', %(pairs)s, clock_timestamp(), clock_timestamp(), 'real',
        %(reason)s, %(detail)s::jsonb)
on conflict (endpoint_id, part, path, kind)
do update set count = excluded.count, last_seen = excluded.last_seen, reason = excluded.reason, detail = excluded.detail
