"""A ledger with many findings: one changed serializer, one CORS layer, two new server errors, at many endpoints."""

from __future__ import annotations

from support_serve import Ledger

ENDPOINTS, MEMBERS, PAIRS_PER_ENDPOINT = 1000, 9, 20
FINDINGS = ENDPOINTS * (MEMBERS + 1) + 2

SEED = """
insert into abreast.endpoint (service, method, route, compared)
select 'shop', 'GET', '/r' || n || '/{id}', %(pairs)s from generate_series(1, %(endpoints)s) n;

insert into abreast.finding (endpoint_id, part, path, kind, impact, count, first_seen, last_seen, state, reason, detail)
select e.id, 'body', '$.items[*].amount_' || m, 'type', 'breaking', %(pairs)s, now(), now(), 'real', 'seen',
       jsonb_build_object('old', '1' || m || '.5', 'new', '"1' || m || '.5"')
from abreast.endpoint e, generate_series(1, %(members)s) m;

insert into abreast.finding (endpoint_id, part, path, kind, impact, count, first_seen, last_seen, state, reason, detail)
select e.id, 'header', 'access-control-allow-origin', 'removed', 'value', %(pairs)s, now(), now(), 'undecided', '',
       jsonb_build_object('old', '"*"', 'new', null)
from abreast.endpoint e;

insert into abreast.finding (endpoint_id, part, path, kind, impact, count, first_seen, last_seen, state, reason, detail)
select id, 'status', '200->500', 'changed', 'breaking', 1, now(), now(), 'undecided', '',
       jsonb_build_object('old', '200', 'new', '500')
from abreast.endpoint order by id desc limit 2;

select abreast.open_day(current_date);

insert into abreast.pair (day, id, at, endpoint_id, outcome, findings, live, old_status, new_status, old_us, new_us)
select current_date, gen_random_uuid()::text, now() - interval '1 minute', e.id, 'mismatch',
       array(select id from abreast.finding f where f.endpoint_id = e.id and f.part <> 'status' order by id),
       'old', 200, 200, 1500, 2500
from abreast.endpoint e, generate_series(1, %(pairs)s);

insert into abreast.example (day, pair_id, captures, differences)
select distinct on (endpoint_id) day, id, ''::bytea, '[]'::jsonb from abreast.pair;

insert into abreast.finding_example (finding_id, day, pair_id, body_bytes)
select f.id, x.day, x.pair_id, 10
from abreast.example x
join abreast.pair p on p.day = x.day and p.id = x.pair_id
join abreast.finding f on f.endpoint_id = p.endpoint_id;

analyze abreast.pair; analyze abreast.hourly_count; analyze abreast.finding; analyze abreast.finding_example; analyze abreast.endpoint;
"""


def fill(ledger: Ledger, *, endpoints: int = ENDPOINTS) -> None:
    values = {"endpoints": endpoints, "members": MEMBERS, "pairs": PAIRS_PER_ENDPOINT}
    sql = SEED
    for name, value in values.items():
        sql = sql.replace(f"%({name})s", str(value))
    for statement in sql.split(";"):
        if statement.strip():
            ledger.execute(statement)
