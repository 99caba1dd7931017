-- Days that are over, the oldest first: older than is kept, or with all younger ones too large together. Never today, and
-- in the first hour never yesterday: entries of its last minutes may be on their way.
select day, bytes
from (
    select day, bytes, sum(bytes) over (order by day desc) as together
    from (
        select to_date(substring(child.relname from 'pair_([0-9]{8})$'), 'YYYYMMDD') as day,
               pg_total_relation_size(child.oid)::bigint as bytes
        from pg_inherits
        join pg_class as child on child.oid = pg_inherits.inhrelid
        where pg_inherits.inhparent = 'abreast.pair'::regclass
    ) as sized
) as days
where day < ((%(now)s::timestamptz - interval '1 hour') at time zone 'UTC')::date - %(days)s::integer
   or (%(bytes)s::bigint > 0 and together > %(bytes)s::bigint
       and day < ((%(now)s::timestamptz - interval '1 hour') at time zone 'UTC')::date)
order by day
