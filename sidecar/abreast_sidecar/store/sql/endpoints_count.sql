update abreast.endpoint
set compared = endpoint.compared + given.compared,
    baseline_compared = endpoint.baseline_compared + given.baseline_compared
from json_to_recordset(%(given)s::json) as given (id integer, compared bigint, baseline_compared bigint)
where endpoint.id = given.id
