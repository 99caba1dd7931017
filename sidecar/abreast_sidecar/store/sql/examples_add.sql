-- Under the locks of the findings, so that none ever has more examples than it may.
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
