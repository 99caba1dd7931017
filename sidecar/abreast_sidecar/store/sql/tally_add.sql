insert into abreast.tally (service, day, outcome, pairs)
select service, date '1970-01-01' + day, outcome, pairs
from json_to_recordset(%(given)s::json) as given (service text, day integer, outcome text, pairs bigint)
order by service, day, outcome
on conflict (service, day, outcome) do update set pairs = tally.pairs + excluded.pairs
