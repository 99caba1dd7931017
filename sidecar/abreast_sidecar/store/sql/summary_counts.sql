select
    (
        select count(*)
        from abreast.finding f join abreast.endpoint e on e.id = f.endpoint_id
        where e.service = %(service)s and abreast.open_regression(f)
          and case when abreast.of_no_pair(f)
              then f.count > 0 and f.last_seen >= coalesce(%(start)s::timestamptz, '-infinity')
               and f.first_seen < coalesce(%(end)s::timestamptz, 'infinity')
              when %(windowed)s
              then f.id in (
                  select unnest(p.findings)
                  from abreast.pair p
                  where p.findings <> '{}'
                    and (%(start)s::timestamptz is null or p.at >= %(start)s)
                    and (%(end)s::timestamptz is null or p.at < %(end)s)
              )
              else f.count > 0 end
    ) as findings
