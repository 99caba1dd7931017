-- Whether the pair shows anything that is not known to be noise.
select exists (
    select from abreast.pair p join abreast.finding f on f.id = any(p.findings)
    where p.id = %(pair)s and p.day = %(day)s::date and f.state <> 'noise' and p.drift is null
) as wanted
