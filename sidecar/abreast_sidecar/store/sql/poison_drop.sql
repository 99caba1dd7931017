delete from abreast.poison where at < clock_timestamp() - %(days)s * interval '1 day'
