insert into abreast.poison (at, service, entry, reason, content)
select timestamptz 'epoch' + %(ms)s * interval '1 ms', %(service)s, %(entry)s, %(reason)s, %(content)s
where (select count(*) from abreast.poison where service = %(service)s) < %(limit)s
on conflict do nothing
