-- Takes entries that are in the ledger out of the stream. An entry's bytes are given back once, by whoever deletes it.
-- KEYS: ready, stats. ARGV: group, then (entry, bytes) for each. Returns how many were deleted.
local ready, stats = KEYS[1], KEYS[2]
local deleted, bytes = 0, 0
for i = 2, #ARGV, 2 do
  redis.call('XACK', ready, ARGV[1], ARGV[i])
  if redis.call('XDEL', ready, ARGV[i]) == 1 then
    deleted = deleted + 1
    bytes = bytes + tonumber(ARGV[i + 1])
  end
end
if bytes > 0 then
  redis.call('HINCRBY', stats, 'bytes', -bytes)
end
return deleted
