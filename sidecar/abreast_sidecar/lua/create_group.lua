#!lua flags=allow-oom
-- Creates the consumer group of the sidecars unless it exists, even when Redis is at its maxmemory: reading frees memory.
-- KEYS: ready. ARGV: group.
local reply = redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
if reply.err and not string.find(reply.err, 'BUSYGROUP', 1, true) then
  return reply
end
return 1
