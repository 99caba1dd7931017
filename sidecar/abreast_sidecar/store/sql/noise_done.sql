update abreast.endpoint
set judged_compared = given.compared, judged_baseline = given.baseline_compared
from json_to_recordset(%(given)s::json) as given (id integer, compared bigint, baseline_compared bigint)
where endpoint.id = given.id
