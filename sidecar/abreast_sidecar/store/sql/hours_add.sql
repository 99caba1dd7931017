insert into abreast.hour (endpoint_id, hour, outcome, pairs, first, last)
select endpoint_id, timestamptz 'epoch' + hour * interval '1 hour', outcome, sum(pairs),
       timestamptz 'epoch' + min(first_ms) * interval '1 ms', timestamptz 'epoch' + max(last_ms) * interval '1 ms'
from json_to_recordset(%(given)s::json) as given (
    endpoint_id integer, hour integer, outcome text, pairs bigint, first_ms bigint, last_ms bigint
)
group by endpoint_id, hour, outcome
order by endpoint_id, hour, outcome
on conflict (endpoint_id, hour, outcome) do update
set pairs = hour.pairs + excluded.pairs, first = least(hour.first, excluded.first), last = greatest(hour.last, excluded.last)
