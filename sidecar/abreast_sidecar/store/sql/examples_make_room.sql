-- The largest example of a finding gives way to one of at most half its size, a bounded number of times. The findings'
-- rows are locked already.
with given as (
    select finding_id, min(size) as size
    from json_to_recordset(%(given)s::json) as given (finding_id bigint, size integer)
    group by finding_id
),
largest as (
    select given.finding_id, kept.day, kept.pair_id
    from given
    join abreast.finding f on f.id = given.finding_id
    cross join lateral (
        select day, pair_id, size, count(*) over () as many
        from abreast.finding_example
        where finding_id = given.finding_id
        order by size desc, day, pair_id
        limit 1
    ) as kept
    where kept.many >= %(limit)s and given.size * 2 <= kept.size and f.replaced < %(most)s
),
counted as (
    update abreast.finding set replaced = replaced + 1 from largest where finding.id = largest.finding_id
)
delete from abreast.finding_example as gone
using largest
where (gone.finding_id, gone.day, gone.pair_id) = (largest.finding_id, largest.day, largest.pair_id)
returning gone.day, gone.pair_id
