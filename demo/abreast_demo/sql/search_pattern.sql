-- The pause simulates a scan of a large catalogue.
select id, name, category, price_cents, stock
from pg_sleep(0.1), product
where name ~* %(pattern)s
order by id
limit 20
