select id from abreast.rule where ended is null and expires <= clock_timestamp()
