-- Pairs by hour (UTC) and by all that is counted of them, so that no question about a window needs to look at every row.
-- The table of pairs keeps these sums by itself, whoever writes it; they are gone with their day.
drop table abreast.hour;

create table abreast.hour (
    endpoint_id integer not null,
    hour timestamptz not null, -- its beginning
    outcome text not null,
    old_release text not null,
    new_release text not null,
    old_status smallint,
    new_status smallint,
    shown bytea not null, -- digest of the next four, which are those of the pairs; `findings` in order
    findings bigint[] not null,
    explained bigint[],
    explained_by integer[],
    drift bigint[],
    pairs bigint not null, -- 0 where they were judged again, and show something else now
    first timestamptz not null,
    last timestamptz not null,
    constraint hour_key unique nulls not distinct
        (endpoint_id, hour, outcome, old_release, new_release, old_status, new_status, shown)
) with (fillfactor = 70);

create index hour_hour on abreast.hour (hour);

create function abreast.in_order(bigint[]) returns bigint[] language sql immutable as $$
    select case when cardinality($1) < 2 then $1 else array(select distinct unnest($1) order by 1) end
$$;

-- The statement that adds pairs to the sums, or with a sign of -1 takes them off. In one order, so that two workers never
-- wait for each other.
create function abreast.summing(source text) returns text language sql immutable as $$
    select format($f$
        insert into abreast.hour as known (
            endpoint_id, hour, outcome, old_release, new_release, old_status, new_status, shown, findings, explained,
            explained_by, drift, pairs, first, last
        )
        select endpoint_id, hour, outcome, old_release, new_release, old_status, new_status,
               case when findings = '{}' and explained is null and drift is null then ''
                    else sha256(convert_to(row(findings, explained, explained_by, drift)::text, 'UTF8')) end as shown,
               findings, explained, explained_by, drift, sum(sign), min(at), max(at)
        from (
            select sign, endpoint_id, date_trunc('hour', at, 'UTC') as hour, outcome, old_release, new_release,
                   old_status, new_status, abreast.in_order(findings) as findings, explained, explained_by, drift, at
            from (%s) as changed
        ) as told
        group by endpoint_id, hour, outcome, old_release, new_release, old_status, new_status, findings, explained,
                 explained_by, drift
        having sum(sign) <> 0
        order by endpoint_id, hour, outcome, old_release, new_release, old_status, new_status, shown
        on conflict on constraint hour_key do update
        set pairs = known.pairs + excluded.pairs, first = least(known.first, excluded.first),
            last = greatest(known.last, excluded.last)
    $f$, source)
$$;

create function abreast.sum_up() returns trigger language plpgsql as $$
begin
    execute abreast.summing(case tg_op
        when 'INSERT' then 'select 1 as sign, * from added'
        when 'DELETE' then 'select -1 as sign, * from gone'
        else 'select 1 as sign, * from added union all select -1, * from gone'
    end);
    return null;
end $$;

create trigger pair_added after insert on abreast.pair
    referencing new table as added for each statement execute function abreast.sum_up();
create trigger pair_changed after update on abreast.pair
    referencing new table as added old table as gone for each statement execute function abreast.sum_up();
create trigger pair_gone after delete on abreast.pair
    referencing old table as gone for each statement execute function abreast.sum_up();

do $$ begin
    execute abreast.summing('select 1 as sign, * from abreast.pair');
end $$;

-- What the pairs of a window are counted by: sums of its whole hours, and rows for what it has of the hours at its two ends.
create function abreast.sums(endpoints integer[], start timestamptz, over timestamptz) returns table (
    endpoint_id integer, outcome text, old_release text, new_release text, old_status smallint, new_status smallint,
    findings bigint[], explained bigint[], explained_by integer[], drift bigint[], pairs bigint, first timestamptz,
    last timestamptz
) language sql stable as $$
    select h.endpoint_id, h.outcome, h.old_release, h.new_release, h.old_status, h.new_status, h.findings, h.explained,
           h.explained_by, h.drift, h.pairs, h.first, h.last
    from abreast.hour h
    where h.endpoint_id = any(endpoints)
      and h.hour >= date_trunc('hour', coalesce(start, '-infinity') + interval '3599.999999 seconds', 'UTC')
      and h.hour < date_trunc('hour', coalesce(over, 'infinity'), 'UTC')
    union all
    select p.endpoint_id, p.outcome, p.old_release, p.new_release, p.old_status, p.new_status, p.findings, p.explained,
           p.explained_by, p.drift, 1, p.at, p.at
    from abreast.pair p
    where p.endpoint_id = any(endpoints)
      and p.at >= start and p.day >= (start at time zone 'UTC')::date
      and p.at < least(over, date_trunc('hour', start + interval '3599.999999 seconds', 'UTC'))
      and p.day <= (least(over, date_trunc('hour', start + interval '3599.999999 seconds', 'UTC')) at time zone 'UTC')::date
    union all
    select p.endpoint_id, p.outcome, p.old_release, p.new_release, p.old_status, p.new_status, p.findings, p.explained,
           p.explained_by, p.drift, 1, p.at, p.at
    from abreast.pair p
    where p.endpoint_id = any(endpoints)
      and p.at < over and p.day <= (over at time zone 'UTC')::date
      and p.at >= greatest(
          date_trunc('hour', over, 'UTC'), date_trunc('hour', start + interval '3599.999999 seconds', 'UTC')
      )
      and p.day >= (date_trunc('hour', over, 'UTC') at time zone 'UTC')::date
$$;
