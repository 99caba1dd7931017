#!lua flags=allow-oom
-- Deletes a consumer without pending entries. It is one step, because deleting a consumer loses its pending entries.
-- KEYS: ready. ARGV: group, consumer. Returns 1 if the consumer was deleted.
if #redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2]) > 0 then
  return 0
end
redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
return 1
