-- The pause stands for a scan of a catalogue that is too large for it.
select id, name, category, price_cents, stock
from pg_sleep(0.03), product
where name ~* %(pattern)s
order by id
limit 20
