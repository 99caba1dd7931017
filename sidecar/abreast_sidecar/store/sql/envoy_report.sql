select counted, last, extract(epoch from clock_timestamp() - seen)::float8 as age
from abreast.envoy_report
where node = %(node)s and service = %(service)s
