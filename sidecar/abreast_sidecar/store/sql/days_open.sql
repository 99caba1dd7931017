select abreast.open_day((clock_timestamp() at time zone 'UTC')::date + ahead) from generate_series(0, 1) as ahead
