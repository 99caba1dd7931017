update abreast.finding set drift = drift + 1 where id = any(%(ids)s)
