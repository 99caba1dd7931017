-- name: examples_add
-- Insert examples under the locks of their findings, so that no finding exceeds its limit.
with input as (
    select finding_id, date '1970-01-01' + day as day, pair_id, body_bytes,
           row_number() over (partition by finding_id order by body_bytes, pair_id) as number
    from json_to_recordset(%(links)s::json) as input (finding_id bigint, day integer, pair_id text, body_bytes integer)
), accepted as (
    select finding_id, day, pair_id, body_bytes
    from input
    where number + (
        select count(*) from abreast.finding_example as kept where kept.finding_id = input.finding_id
    ) <= %(limit)s
), existing as (
    insert into abreast.example (day, pair_id, captures, differences)
    select example.day, example.pair_id, example.captures, example.differences::jsonb
    from (
        select date '1970-01-01' + day as day, pair_id, captures, differences
        from unnest(%(days)s::integer[], %(pairs)s::text[], %(captures)s::bytea[], %(differences)s::text[])
            as input (day, pair_id, captures, differences)
    ) as example
    where exists (select from accepted where accepted.day = example.day and accepted.pair_id = example.pair_id)
    order by example.day, example.pair_id
    on conflict do nothing
)
insert into abreast.finding_example (finding_id, day, pair_id, body_bytes)
select finding_id, day, pair_id, body_bytes from accepted
on conflict do nothing

-- name: example_counts
select f.id, count(e.body_bytes), coalesce(max(e.body_bytes), 0), f.examples_replaced
from abreast.finding f left join abreast.finding_example e on e.finding_id = f.id
where f.id = any(%(ids)s)
group by f.id

-- name: examples_evict
-- Remove the largest example of a finding for one of at most half its size, a bounded number of times. The findings are
-- locked already.
with input as (
    select finding_id, min(body_bytes) as body_bytes
    from json_to_recordset(%(rows)s::json) as input (finding_id bigint, body_bytes integer)
    group by finding_id
),
largest as (
    select input.finding_id, existing.day, existing.pair_id
    from input
    join abreast.finding f on f.id = input.finding_id
    cross join lateral (
        select day, pair_id, body_bytes, count(*) over () as examples
        from abreast.finding_example
        where finding_id = input.finding_id
        order by body_bytes desc, day, pair_id
        limit 1
    ) as existing
    where existing.examples >= %(limit)s and input.body_bytes * 2 <= existing.body_bytes
        and f.examples_replaced < %(max_replaced)s
),
counted as (
    update abreast.finding set examples_replaced = examples_replaced + 1 from largest where finding.id = largest.finding_id
)
delete from abreast.finding_example as deleted
using largest
where (deleted.finding_id, deleted.day, deleted.pair_id) = (largest.finding_id, largest.day, largest.pair_id)
returning deleted.day, deleted.pair_id

-- name: examples_delete_unused
-- The fixed order prevents deadlocks between workers.
delete from abreast.example
where (day, pair_id) in (
    select day, pair_id
    from abreast.example as e join unnest(%(days)s::date[], %(pairs)s::text[])
        as deleted (day, pair_id) using (day, pair_id)
    where not exists (select from abreast.finding_example as f where (f.day, f.pair_id) = (e.day, e.pair_id))
    order by day, pair_id
    for update of e
)

-- name: samples_showing
select features, client
from abreast.request_sample
where endpoint_id = (select endpoint_id from abreast.finding where id = %(id)s) and finding_id = %(id)s
order by slot

-- name: samples_without
-- Return random requests of the endpoint that don't show the finding.
select features, client
from abreast.request_sample
where endpoint_id = (select endpoint_id from abreast.finding where id = %(id)s) and finding_id = 0
  and not findings @> array[%(id)s::bigint]
order by slot
