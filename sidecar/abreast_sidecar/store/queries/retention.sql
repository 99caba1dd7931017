-- name: days_expired
-- List finished days to drop, oldest first: expired ones, and those above the size limit. Today is never listed, and
-- yesterday not in the first hour, because late entries may arrive.
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

-- name: day_drop
select abreast.drop_day(%(day)s)

-- name: bets_expire
-- Pairs of one period may be an hour apart if a worker has stopped.
delete from abreast.bet where at < clock_timestamp() - interval '1 hour'

-- name: dead_letters_expire
delete from abreast.dead_letter where at < %(oldest)s

-- name: samples_expire
delete from abreast.request_sample where at < %(oldest)s

-- name: examples_trim
-- Delete the largest examples until the rest fits, but keep the smallest one of each open finding.
with whole as (
    select day, pair_id, octet_length(captures) as bytes from abreast.example
),
staying as (
    select distinct on (l.finding_id) l.day, l.pair_id
    from abreast.finding_example l join abreast.finding f on f.id = l.finding_id
    where f.status not in ('expected', 'fixed') and (f.state <> 'noise' or f.status = 'confirmed')
    order by l.finding_id, l.body_bytes, l.day, l.pair_id
),
leaving as (
    select day, pair_id, sum(bytes) over (order by bytes desc, day, pair_id) - bytes as before
    from whole
    where (day, pair_id) not in (select day, pair_id from staying)
)
delete from abreast.example as deleted
using leaving
where (deleted.day, deleted.pair_id) = (leaving.day, leaving.pair_id)
  and leaving.before < (select coalesce(sum(bytes), 0) from whole) - %(max_bytes)s::bigint

-- name: reports_fold
select abreast.fold_reports(%(oldest)s)

-- name: releases_fold
select abreast.fold_releases()
