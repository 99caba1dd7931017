#!lua flags=allow-oom
-- Takes entries that are in the ledger out of the stream. An entry's bytes are given back once, by whoever deletes it.
-- Also where Redis is at its maxmemory: this is what makes room.
-- KEYS: ready, stats, due. ARGV: group, then (entry, bytes) for each. Returns how many were deleted.
local ready, stats, due = KEYS[1], KEYS[2], KEYS[3]
local deleted, bytes = 0, 0
for i = 2, #ARGV, 2 do
  redis.call('XACK', ready, ARGV[1], ARGV[i])
  if redis.call('XDEL', ready, ARGV[i]) == 1 then
    deleted = deleted + 1
    bytes = bytes + tonumber(ARGV[i + 1])
  end
end
if deleted > 0 and redis.call('XLEN', ready) == 0 and redis.call('ZCARD', due) == 0 then
  redis.call('HSET', stats, 'bytes', 0) -- nothing is held: what others deleted by hand is not counted for ever
elseif bytes > 0 then
  redis.call('HINCRBY', stats, 'bytes', -bytes)
end
return deleted
