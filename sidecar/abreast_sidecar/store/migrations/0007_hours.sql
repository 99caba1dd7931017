-- Pairs by endpoint, hour (UTC) and outcome, so that a summary needs no look at every row. Written together with the rows,
-- and gone with them.
create table abreast.hour (
    endpoint_id integer not null,
    hour timestamptz not null, -- its beginning
    outcome text not null,
    pairs bigint not null,
    first timestamptz not null,
    last timestamptz not null,
    primary key (endpoint_id, hour, outcome)
) with (fillfactor = 70);

insert into abreast.hour (endpoint_id, hour, outcome, pairs, first, last)
select endpoint_id, date_trunc('hour', at, 'UTC'), outcome, count(*), min(at), max(at)
from abreast.pair
group by 1, 2, 3;

create or replace function abreast.drop_day(wanted date) returns void language plpgsql as $$
begin
    perform set_config('lock_timeout', '1s', true);
    execute format('drop table if exists abreast.%I', 'pair_' || to_char(wanted, 'YYYYMMDD'));
    delete from abreast.example where day <= wanted;
    delete from abreast.hour where hour < (wanted + 1)::timestamp at time zone 'UTC';
end $$;
