select abreast.record_event(%(service)s, %(at)s, %(actor)s, %(action)s, %(reason)s, %(before)s, %(after)s, '{}')
