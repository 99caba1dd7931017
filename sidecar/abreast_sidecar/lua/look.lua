#!lua flags=allow-oom
-- What a shard says of itself. `life` names the life of its counters: a Redis that lost its data has none.
-- KEYS: stats, due, ready. ARGV: a name for a new life. Returns {counters as a flat list, waiting, ready}.
redis.call('HSETNX', KEYS[1], 'life', ARGV[1])
return {redis.call('HGETALL', KEYS[1]), redis.call('ZCARD', KEYS[2]), redis.call('XLEN', KEYS[3])}
