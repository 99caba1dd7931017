delete from abreast.poison where at < %(oldest)s
