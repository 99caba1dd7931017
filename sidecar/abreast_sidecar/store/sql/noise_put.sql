update abreast.finding
set state = given.state, reason = given.reason
from json_to_recordset(%(given)s::json) as given (id bigint, state text, reason text)
where finding.id = given.id
