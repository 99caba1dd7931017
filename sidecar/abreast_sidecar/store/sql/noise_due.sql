-- Findings of the endpoints whose counts changed, with what theirs are held against; without those that tests of their
-- own found.
select e.id as endpoint, e.compared, e.baseline_compared, f.id, f.part, f.path, f.kind, f.count, f.baseline_count,
       f.explained, f.new_greater, f.new_smaller, f.state, f.reason
from abreast.endpoint e
left join abreast.finding f on f.endpoint_id = e.id and f.part not in ('latency', 'cache') and f.path <> 'no capture'
where (e.compared, e.baseline_compared) <> (e.judged_compared, e.judged_baseline)
order by e.id, f.id
