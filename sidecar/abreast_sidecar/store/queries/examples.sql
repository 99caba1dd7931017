-- name: examples_add
-- Insert examples under the locks of their findings, so that no finding exceeds its limit.
with given as (
    select finding_id, date '1970-01-01' + day as day, pair_id, size,
           row_number() over (partition by finding_id order by size, pair_id) as place
    from json_to_recordset(%(links)s::json) as given (finding_id bigint, day integer, pair_id text, size integer)
), welcome as (
    select finding_id, day, pair_id, size
    from given
    where place + (select count(*) from abreast.finding_example as kept where kept.finding_id = given.finding_id)
          <= %(limit)s
), kept as (
    insert into abreast.example (day, pair_id, captures, differences)
    select whole.day, whole.pair_id, whole.captures, whole.differences::jsonb
    from (
        select date '1970-01-01' + day as day, pair_id, captures, differences
        from unnest(%(days)s::integer[], %(pairs)s::text[], %(captures)s::bytea[], %(differences)s::text[])
            as given (day, pair_id, captures, differences)
    ) as whole
    where exists (select from welcome where welcome.day = whole.day and welcome.pair_id = whole.pair_id)
    order by whole.day, whole.pair_id
    on conflict do nothing
)
insert into abreast.finding_example (finding_id, day, pair_id, size)
select finding_id, day, pair_id, size from welcome
on conflict do nothing

-- name: examples_known
select f.id, count(e.size), coalesce(max(e.size), 0), f.replaced
from abreast.finding f left join abreast.finding_example e on e.finding_id = f.id
where f.id = any(%(ids)s)
group by f.id

-- name: examples_make_room
-- Remove the largest example of a finding for one of at most half its size, a bounded number of times. The findings are
-- locked already.
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

-- name: examples_unused
-- The fixed order prevents deadlocks between workers.
delete from abreast.example
where (day, pair_id) in (
    select day, pair_id
    from abreast.example as e join unnest(%(days)s::date[], %(pairs)s::text[]) as gone (day, pair_id) using (day, pair_id)
    where not exists (select from abreast.finding_example as f where (f.day, f.pair_id) = (e.day, e.pair_id))
    order by day, pair_id
    for update of e
)

-- name: samples_add
insert into abreast.request_sample (endpoint_id, finding_id, slot, at, findings, features)
select endpoint_id, finding_id, slot, timestamptz 'epoch' + ms * interval '1 ms', findings, features
from json_to_recordset(%(given)s::json) as given (
    endpoint_id integer, finding_id bigint, slot smallint, ms bigint, findings bigint[], features jsonb
)
order by endpoint_id, finding_id, slot
on conflict (endpoint_id, finding_id, slot)
do update set at = excluded.at, findings = excluded.findings, features = excluded.features

-- name: samples_showing
select features
from abreast.request_sample
where endpoint_id = (select endpoint_id from abreast.finding where id = %(id)s) and finding_id = %(id)s
order by slot

-- name: samples_without
-- Return random requests of the endpoint that don't show the finding.
select features
from abreast.request_sample
where endpoint_id = (select endpoint_id from abreast.finding where id = %(id)s) and finding_id = 0
  and not findings @> array[%(id)s::bigint]
order by slot
