update abreast.pair
set drift = %(ids)s, reason = %(reason)s,
    findings = array(select one from unnest(findings) with ordinality as f (one, place)
                     where one <> all(%(ids)s) order by place)
where id = %(pair)s and day = %(day)s::date
