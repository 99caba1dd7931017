-- In one order, so that two workers never wait for each other.
delete from abreast.example
where (day, pair_id) in (
    select day, pair_id
    from abreast.example as e join unnest(%(days)s::date[], %(pairs)s::text[]) as gone (day, pair_id) using (day, pair_id)
    where not exists (select from abreast.finding_example as f where (f.day, f.pair_id) = (e.day, e.pair_id))
    order by day, pair_id
    for update of e
)
