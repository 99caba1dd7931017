-- When Envoys counted sampled requests: all of a service together, by ten seconds, of which `at` is the beginning. The
-- sums of days that retention dropped are one row, at -infinity.
create table abreast.envoy_count (
    service text not null,
    at timestamptz not null,
    sampled bigint not null,
    primary key (service, at)
) with (fillfactor = 70);

-- Requests that Envoys sampled in a window, as far as their counts tell when: one is asked once a second, and what it
-- counted since then is spread evenly. What was counted when nobody wrote down the time may belong to any window.
create function abreast.envoy_sampled(wanted text, start timestamptz, over timestamptz) returns bigint
language sql stable as $$
    with known as (
        select sum((counted->>'sampled')::bigint)::bigint as total from abreast.envoy_report where service = wanted
    ),
    placed as (
        select coalesce(sum(sampled), 0) as total from abreast.envoy_count where service = wanted
    ),
    inside as (
        select coalesce(sum(sampled * case
                   when span.until <= at then 1
                   else extract(epoch from least(span.until, over) - greatest(at, start))
                      / extract(epoch from span.until - at) end), 0) as total
        from abreast.envoy_count
        cross join lateral (select least(at + interval '10 seconds', clock_timestamp()) as until) as span
        where service = wanted and isfinite(at)
          and at > coalesce(start, '-infinity') - interval '10 seconds' and at < coalesce(over, 'infinity')
          and span.until > coalesce(start, '-infinity')
    )
    select case when start is null and over is null then known.total
                else round(inside.total)::bigint + greatest(known.total - placed.total, 0)::bigint end
    from known, placed, inside
$$;

-- Findings that a test of their own found, over many pairs: no single pair shows one, and none is told from noise by counts.
create function abreast.of_no_pair(f abreast.finding) returns boolean language sql immutable as $$
    select f.part in ('latency', 'cache') or f.path = 'no capture'
$$;

create or replace function abreast.drop_day(wanted date) returns void language plpgsql as $$
declare
    following timestamptz := (wanted + 1)::timestamp at time zone 'UTC';
begin
    perform set_config('lock_timeout', '1s', true);
    execute format('drop table if exists abreast.%I', 'pair_' || to_char(wanted, 'YYYYMMDD'));
    delete from abreast.example where day <= wanted;
    delete from abreast.hour where hour < following;
    with gone as (
        delete from abreast.envoy_count where isfinite(at) and at < following returning service, sampled
    )
    insert into abreast.envoy_count as known (service, at, sampled)
    select service, '-infinity', sum(sampled) from gone group by service
    on conflict (service, at) do update set sampled = known.sampled + excluded.sampled;
end $$;
