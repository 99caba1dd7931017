-- In one order, so that two workers never wait for each other.
select from abreast.endpoint where id = any(%(ids)s) order by id for no key update
