-- A copy may take longer than the request itself, where guards hold its writes back, or less, on caches that are warm.
-- How much is told by old alone: `copy_us` is what it took for the baseline copy of a request that it answered itself.
alter table abreast.pair add column copy_us integer;

create table abreast.copy_cost (
    endpoint_id integer primary key references abreast.endpoint,
    ratio real not null, -- of a copy's time to the request's own, in the median
    copies integer not null -- it is the median of
) with (fillfactor = 70);

-- How many times as long new takes by its role alone, beside old.
create function abreast.handicap(live text, ratio real) returns float8 immutable parallel safe
language sql return case live when 'old' then coalesce(ratio, 1) when 'new' then 1 / coalesce(ratio, 1) else 1 end;
