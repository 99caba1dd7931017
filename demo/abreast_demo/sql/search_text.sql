select id, name, category, price_cents, stock
from product
where name ilike %(pattern)s escape '\'
order by id
limit 20
