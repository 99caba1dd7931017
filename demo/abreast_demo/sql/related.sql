-- The same thing of another kind, or another thing of the same kind.
select other.id
from product
inner join product as other on other.category = product.category
where
    product.id = %(id)s
    and other.id <> product.id
    and (other.id %% 5 = product.id %% 5 or (other.id - 1) / 5 = (product.id - 1) / 5)
order by other.id
