-- `age` is by the clock by which it is less, Postgres's or the asking machine's: either may have been set since.
select counted, last,
       least(extract(epoch from clock_timestamp() - seen), extract(epoch from %(own)s::timestamptz - asked))::float8 as age
from abreast.envoy_report where node = %(node)s and service = %(service)s
