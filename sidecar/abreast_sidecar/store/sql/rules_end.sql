update abreast.rule set ended = %(version)s, ended_at = clock_timestamp(), ended_by = %(actor)s
where id = any(%(ids)s) and ended is null
returning id
