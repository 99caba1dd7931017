update abreast.pair p
set findings = coalesce(g.findings, '{}'), explained = g.explained, explained_by = g.explained_by,
    noise = coalesce(g.noise, '{}'), noise_explained = g.noise_explained, noise_explained_by = g.noise_explained_by,
    outcome = g.outcome, reason = g.reason, rules = g.rules
from json_to_recordset(%(given)s::json) as g (
    day date, id text, findings bigint[], explained bigint[], explained_by integer[], noise bigint[],
    noise_explained bigint[], noise_explained_by integer[], outcome text, reason text, rules bigint
)
where p.day = g.day and p.id = g.id
