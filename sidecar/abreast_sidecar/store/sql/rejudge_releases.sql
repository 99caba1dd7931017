select service, version, label, id from abreast.release where service = any(%(services)s)
