select service, version, updated_at, new_share, sample_safe, sample_unsafe, baseline_share, rolled_back,
       extract(epoch from clock_timestamp() - updated_at)::float8 as age
from abreast.traffic
where %(service)s::text is null or service = %(service)s
order by service
