select report from abreast.shard_report where service = %(service)s and shard = %(shard)s
