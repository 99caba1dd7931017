select
    count(*)::integer as products,
    count(*) filter (where stock > 0)::integer as in_stock,
    round(avg(price_cents))::integer as average_cents,
    (percentile_disc(0.5) within group (order by price_cents))::integer as median_cents
from product
