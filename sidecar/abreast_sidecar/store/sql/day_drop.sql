select abreast.drop_day(%(day)s)
