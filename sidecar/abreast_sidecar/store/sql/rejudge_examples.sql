update abreast.example x
set differences = g.differences
from json_to_recordset(%(given)s::json) as g (day date, id text, differences jsonb)
where x.day = g.day and x.pair_id = g.id
