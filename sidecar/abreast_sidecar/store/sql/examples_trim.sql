-- The largest examples go until the rest has the size that is allowed; of each open finding its smallest one stays.
with whole as (
    select day, pair_id, octet_length(captures) as bytes from abreast.example
),
staying as (
    select distinct on (l.finding_id) l.day, l.pair_id
    from abreast.finding_example l join abreast.finding f on f.id = l.finding_id
    where f.status not in ('expected', 'fixed') and (f.state <> 'noise' or f.status = 'confirmed')
    order by l.finding_id, l.size, l.day, l.pair_id
),
leaving as (
    select day, pair_id, sum(bytes) over (order by bytes desc, day, pair_id) - bytes as before
    from whole
    where (day, pair_id) not in (select day, pair_id from staying)
)
delete from abreast.example as gone
using leaving
where (gone.day, gone.pair_id) = (leaving.day, leaving.pair_id)
  and leaving.before < (select coalesce(sum(bytes), 0) from whole) - %(most)s::bigint
