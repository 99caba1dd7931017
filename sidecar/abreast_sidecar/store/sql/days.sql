-- Days that have pairs, the newest first.
select to_date(substring(child.relname from 'pair_([0-9]{8})$'), 'YYYYMMDD') as day
from pg_inherits
join pg_class as child on child.oid = pg_inherits.inhrelid
where pg_inherits.inhparent = 'abreast.pair'::regclass
order by day desc
