-- Takes a batch of captures, joins what belongs together and moves complete pairs to the stream, atomically.
-- KEYS: due, ready, joined, stats, then the pair's hash for each capture.
-- ARGV: wait_ms, max_pairs, max_bytes, remember, remember_ms, then (pair, slot, arms, capture) for each.
-- Returns {captures kept, duplicate, late, refused for pairs, refused for bytes}.
local due, ready, joined, stats = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local wait_ms, max_pairs, max_bytes = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local remember, remember_ms = tonumber(ARGV[4]), tonumber(ARGV[5])
local REFUSED = '!' -- before the id of a pair of which a copy was refused; among those that were moved
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

local held = tonumber(redis.call('HGET', stats, 'bytes') or '0')
local waiting = redis.call('ZCARD', due)
local queued = redis.call('XLEN', ready)
local count = {received = 0, duplicate = 0, late = 0, rejected_pairs = 0, rejected_bytes = 0, joined = 0}
local before = held

-- The last copy goes to the stream with those that wait, and needs no place among them.
local function move(pair, hash, slot, capture)
  local entry = {'pair', pair, 'why', 'joined', slot, capture}
  for _, part in ipairs(redis.call('HGETALL', hash)) do
    entry[#entry + 1] = part
  end
  redis.call('XADD', ready, '*', unpack(entry))
  redis.call('DEL', hash)
  if redis.call('ZREM', due, pair) == 1 then
    waiting = waiting - 1
  end
  redis.call('ZADD', joined, now, pair)
  queued = queued + 1
  count.joined = count.joined + 1
end

-- What waits for the pair: how many captures, how many of them are first attempts, and whether this one is there. A
-- failed-over request has a second attempt beside its copies; it must not take the place of a copy that is still on its way.
local function waits(hash, wanted)
  local slots = redis.pcall('HKEYS', hash)
  if slots.err then -- not a hash: nothing of ours
    redis.call('DEL', hash)
    return 0, 0, false
  end
  local first, found = 0, false
  for _, slot in ipairs(slots) do
    if string.sub(slot, -2) == ':1' then
      first = first + 1
    end
    found = found or slot == wanted
  end
  return #slots, first, found
end

-- Pairs that wait have a claim on bytes for their other copies, which are taken to be as large as this one.
local function refused(pair, size, others)
  if waiting + queued >= max_pairs or redis.call('ZSCORE', joined, REFUSED .. pair) then
    return 'rejected_pairs'
  end
  if held + size + (waiting + 1) * others * size > max_bytes then
    return 'rejected_bytes'
  end
end

local function take(hash, pair, slot, arms, capture)
  if redis.call('ZSCORE', joined, pair) then
    return 'late'
  end
  local there, first, found = waits(hash, slot)
  if found then
    return 'duplicate'
  end
  -- A pair is taken as a whole or not at all: half of one would look as if a version had not answered. So there is
  -- always a place for a further copy, and bytes are kept for it.
  if there == 0 then
    local why = refused(pair, #capture, arms - 1)
    if why then
      redis.call('ZADD', joined, now, REFUSED .. pair)
      return why
    end
  elseif held + #capture > max_bytes then
    return 'rejected_bytes'
  end
  if string.sub(slot, -2) == ':1' then
    first = first + 1
  end
  held = held + #capture
  if first >= arms then
    move(pair, hash, slot, capture)
    return 'received'
  end
  redis.call('HSET', hash, slot, capture)
  if there == 0 then
    redis.call('ZADD', due, now + wait_ms, pair)
    waiting = waiting + 1
  end
  return 'received'
end

for i = 5, #KEYS do
  local at = 6 + (i - 5) * 4
  local what = take(KEYS[i], ARGV[at], ARGV[at + 1], tonumber(ARGV[at + 2]), ARGV[at + 3])
  count[what] = count[what] + 1
end

redis.call('ZREMRANGEBYSCORE', joined, '-inf', now - remember_ms)
local over = redis.call('ZCARD', joined) - remember
if over > 0 then
  redis.call('ZREMRANGEBYRANK', joined, 0, over - 1)
end
for name, n in pairs(count) do
  if n > 0 then
    redis.call('HINCRBY', stats, name, n)
  end
end
if held ~= before then
  redis.call('HINCRBY', stats, 'bytes', held - before)
end
return {count.received, count.duplicate, count.late, count.rejected_pairs, count.rejected_bytes}
