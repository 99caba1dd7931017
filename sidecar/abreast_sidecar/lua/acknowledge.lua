#!lua flags=allow-oom
-- Deletes entries that are in the ledger from the stream, even when Redis is at its maxmemory: this frees memory. Each
-- entry's bytes are subtracted once, by the call that deletes it.
-- KEYS: ready, stats, due. ARGV: group, then (entry, bytes) for each. Returns the number of deleted entries.
local ready, stats, due = KEYS[1], KEYS[2], KEYS[3]
local MAX_IDS = 2000 -- per command; Lua's stack holds 8000
local deleted, bytes = 0, 0
for first = 2, #ARGV, 2 * MAX_IDS do
  local ids, sizes = {}, 0
  for i = first, math.min(first + 2 * MAX_IDS, #ARGV) - 1, 2 do
    ids[#ids + 1] = ARGV[i]
    sizes = sizes + tonumber(ARGV[i + 1])
  end
  -- An entry that is pending was not deleted by an earlier call.
  if redis.call('XACK', ready, ARGV[1], unpack(ids)) == #ids then
    deleted = deleted + redis.call('XDEL', ready, unpack(ids))
    bytes = bytes + sizes
  else
    for i = 1, #ids do
      if redis.call('XDEL', ready, ids[i]) == 1 then
        deleted = deleted + 1
        bytes = bytes + tonumber(ARGV[first + 2 * i - 1])
      end
    end
  end
end
if deleted > 0 and redis.call('XLEN', ready) == 0 and redis.call('ZCARD', due) == 0 then
  redis.call('HSET', stats, 'bytes', 0) -- the shard is empty: forget the bytes of entries that were deleted by hand
elseif bytes > 0 then
  redis.call('HINCRBY', stats, 'bytes', -bytes)
end
return deleted
