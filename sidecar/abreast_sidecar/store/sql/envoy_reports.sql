select node, extract(epoch from clock_timestamp() - seen)::float8 as age
from abreast.envoy_report
where service = %(service)s
order by node
