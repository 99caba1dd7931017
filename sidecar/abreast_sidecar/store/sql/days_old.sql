select to_char(day, 'YYYYMMDD') as name, day
from (
    select to_date(substring(child.relname from 'pair_([0-9]{8})$'), 'YYYYMMDD') as day
    from pg_inherits
    join pg_class as child on child.oid = pg_inherits.inhrelid
    where pg_inherits.inhparent = 'abreast.pair'::regclass
) as days
where day < (clock_timestamp() at time zone 'UTC')::date - %(days)s::integer
order by day
