select id, name, category, price_cents, stock
from product
where id = %(id)s
