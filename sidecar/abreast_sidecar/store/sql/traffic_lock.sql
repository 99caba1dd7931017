select service, version, updated_at, new_share, sample_safe, sample_unsafe, baseline_share, rolled_back,
       0::float8 as age
from abreast.traffic
where service = %(service)s
for update
