#!lua flags=allow-oom
-- Reads the counters of a shard. The field `life` identifies their life: it is missing after Redis lost its data.
-- KEYS: stats, due, ready. ARGV: the name of a new life. Returns {counters as a flat list, waiting, ready}.
redis.call('HSETNX', KEYS[1], 'life', ARGV[1])
return {redis.call('HGETALL', KEYS[1]), redis.call('ZCARD', KEYS[2]), redis.call('XLEN', KEYS[3])}
