select service, method, route, id from abreast.endpoint where service = any(%(services)s)
