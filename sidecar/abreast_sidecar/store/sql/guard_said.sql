update abreast.guard set state = %(state)s, said = %(said)s, looked_at = clock_timestamp()
where service = %(service)s and since = %(since)s
