#!lua flags=allow-oom
-- Moves pairs whose time is over to the stream, with what there is of them, atomically.
-- KEYS: due, ready, joined, stats. ARGV: prefix of the pairs' hashes, how many at most. Returns how many were moved.
-- Also where Redis is at its maxmemory: nothing else would ever let go of what waits there.
-- A pair whose hash is gone, or is no pair, is moved too, empty: it was sampled, so it has an outcome.
local MOST = 64 -- fields and values; a pair has a few
local due, ready, joined, stats = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local over = redis.call('ZRANGEBYSCORE', due, '-inf', now, 'LIMIT', 0, ARGV[2])
for _, pair in ipairs(over) do
  local hash = ARGV[1] .. pair
  local entry = {'pair', pair, 'why', 'swept'}
  local parts = redis.pcall('HGETALL', hash)
  if not parts.err and #parts <= MOST then -- anything else is none of ours, and must not hold up the others
    for _, part in ipairs(parts) do
      entry[#entry + 1] = part
    end
  end
  redis.call('XADD', ready, '*', unpack(entry))
  redis.call('DEL', hash)
  redis.call('ZREM', due, pair)
  redis.call('ZADD', joined, now, pair)
end
if #over > 0 then
  redis.call('HINCRBY', stats, 'swept', #over)
end
return #over
