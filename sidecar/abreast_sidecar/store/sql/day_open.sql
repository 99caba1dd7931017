select abreast.open_day(date '1970-01-01' + %(day)s) as open
