select id, name, category, price_cents, stock
from product
where category = %(slug)s
order by id
