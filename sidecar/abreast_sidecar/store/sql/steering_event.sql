select abreast.record_event(%(service)s, clock_timestamp(), %(actor)s, %(action)s, %(reason)s, %(before)s, %(after)s, %(detail)s)
