select id, stars, words
from review
where product_id = %(id)s
order by id
