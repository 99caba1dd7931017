delete from abreast.request_sample where at < %(oldest)s
