#!lua flags=allow-oom
-- Moves overdue pairs to the stream, each with the captures that have arrived. It runs even when Redis is at its maxmemory,
-- because nothing else frees these pairs.
-- A pair whose hash is missing or invalid moves without captures: it was sampled, so it needs an outcome.
-- KEYS: due, ready, joined, stats. ARGV: prefix of the pairs' hashes, limit, group. Returns the number of moved pairs.
local MAX_PARTS = 64 -- fields and values; a pair has a few
local CLOCK_SLACK_MS = 1000
local MAX_PENDING = 10000 -- entries: a few batches of a few workers
local TIMED_OUT_PREFIX = '?' -- in `joined`, as in join.lua
local due, ready, joined, stats = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

-- If the clock was set back since the last run, shift the times of waiting pairs, and reset the idle times of entries that
-- a dead worker may hold. Otherwise both would wait until the clock reaches its former time.
local last_run = tonumber(redis.call('HGET', stats, 'looked') or now)
redis.call('HSET', stats, 'looked', now)
if last_run - now > CLOCK_SLACK_MS then
  local late = redis.call('ZRANGEBYSCORE', due, last_run, '+inf', 'WITHSCORES')
  for i = 1, #late, 2 do
    redis.call('ZADD', due, late[i + 1] - (last_run - now), late[i])
  end
  local pending = redis.pcall('XPENDING', ready, ARGV[3], '-', '+', MAX_PENDING)
  for _, entry in ipairs(pending.err and {} or pending) do
    redis.pcall('XCLAIM', ready, ARGV[3], entry[2], 0, entry[1], 'IDLE', 0, 'JUSTID')
  end
end

local overdue = redis.call('ZRANGEBYSCORE', due, '-inf', now, 'LIMIT', 0, ARGV[2])
for _, pair in ipairs(overdue) do
  local hash = ARGV[1] .. pair
  local entry = {'pair', pair, 'why', 'timed_out'}
  local parts = redis.pcall('HGETALL', hash)
  if not parts.err and #parts <= MAX_PARTS then -- anything else is not a pair, and must not block the others
    for _, part in ipairs(parts) do
      entry[#entry + 1] = part
    end
  end
  redis.call('XADD', ready, '*', unpack(entry))
  redis.call('DEL', hash)
  redis.call('ZREM', due, pair)
  redis.call('ZADD', joined, now, TIMED_OUT_PREFIX .. pair)
end
if #overdue > 0 then
  redis.call('HINCRBY', stats, 'timed_out', #overdue)
end
return #overdue
