#!lua flags=allow-oom
-- Moves pairs whose time is over to the stream, with what there is of them, atomically.
-- KEYS: due, ready, joined, stats. ARGV: prefix of the pairs' hashes, how many at most, group. Returns how many were moved.
-- Also where Redis is at its maxmemory: nothing else would ever let go of what waits there.
-- A pair whose hash is gone, or is no pair, is moved too, empty: it was sampled, so it has an outcome.
local MOST = 64 -- fields and values; a pair has a few
local SLACK = 1000 -- ms
local MOST_GIVEN = 10000 -- entries: some batches of some workers
local due, ready, joined, stats = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

-- Where the clock was set back since the last sweep, what goes by it would wait for it to come there again: pairs, and what
-- a dead worker has not acknowledged. What was set before is after the last sweep.
local looked = tonumber(redis.call('HGET', stats, 'looked') or now)
redis.call('HSET', stats, 'looked', now)
if looked - now > SLACK then
  local late = redis.call('ZRANGEBYSCORE', due, looked, '+inf', 'WITHSCORES')
  for i = 1, #late, 2 do
    redis.call('ZADD', due, late[i + 1] - (looked - now), late[i])
  end
  local given = redis.pcall('XPENDING', ready, ARGV[3], '-', '+', MOST_GIVEN)
  for _, one in ipairs(given.err and {} or given) do
    redis.pcall('XCLAIM', ready, ARGV[3], one[2], 0, one[1], 'IDLE', 0, 'JUSTID')
  end
end

local over = redis.call('ZRANGEBYSCORE', due, '-inf', now, 'LIMIT', 0, ARGV[2])
for _, pair in ipairs(over) do
  local hash = ARGV[1] .. pair
  local entry = {'pair', pair, 'why', 'timed_out'}
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
  redis.call('HINCRBY', stats, 'timed_out', #over)
end
return #over
