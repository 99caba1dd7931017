#!lua flags=allow-oom
-- Removes a consumer that owes nothing; in one step, since removing one with entries would lose them.
-- KEYS: ready. ARGV: group, consumer. Returns whether it was removed.
if #redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2]) > 0 then
  return 0
end
redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
return 1
