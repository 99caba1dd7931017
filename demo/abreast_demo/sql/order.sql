insert into placed_order (id, product_id, quantity)
values (%(id)s, %(product)s, %(quantity)s)
