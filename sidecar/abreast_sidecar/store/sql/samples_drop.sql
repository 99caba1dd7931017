delete from abreast.request_sample where at < clock_timestamp() - %(days)s * interval '1 day'
