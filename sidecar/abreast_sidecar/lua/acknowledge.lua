#!lua flags=allow-oom
-- Deletes entries that are in the ledger from the stream, even when Redis is at its maxmemory: this frees memory. Each
-- entry's bytes are subtracted once, by the call that deletes it.
-- KEYS: ready, stats, due. ARGV: group, then (entry, bytes) for each. Returns the number of deleted entries.
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
  redis.call('HSET', stats, 'bytes', 0) -- the shard is empty: forget the bytes of entries that were deleted by hand
elseif bytes > 0 then
  redis.call('HINCRBY', stats, 'bytes', -bytes)
end
return deleted
