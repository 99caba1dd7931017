-- Where the clock was set back, a state may be of a time to come.
select service, version, updated_at, new_share, sample_safe, sample_unsafe, baseline_share, rolled_back,
       greatest(extract(epoch from clock_timestamp() - updated_at), 0)::float8 as age
from abreast.traffic
where %(service)s::text is null or service = %(service)s
order by service
