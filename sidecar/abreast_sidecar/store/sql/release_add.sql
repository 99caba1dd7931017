-- Beyond a limit all further labels are one, so that labels that are made anew for every process do no harm.
insert into abreast.release (service, version, label)
select %(service)s, %(version)s, %(label)s
where (select count(*) from abreast.release where service = %(service)s) < %(most)s
   or %(label)s = %(other)s
on conflict do nothing
