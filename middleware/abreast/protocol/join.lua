-- Stores a batch of captures, joins them to pairs and moves complete pairs to the stream, atomically.
-- KEYS: due, ready, joined, stats, then the hash of the pair for each capture.
-- ARGV: wait_ms, max_pairs, max_bytes, max_remembered_ids, remember_ms, then for each capture its pair id, its slot, the
-- number of captures of the pair, and the encoded capture.
-- Returns the numbers of captures: {received, duplicate, late, rejected_pairs, rejected_bytes}.
local due, ready, joined, stats = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local wait_ms, max_pairs, max_bytes = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local max_remembered_ids, remember_ms = tonumber(ARGV[4]), tonumber(ARGV[5])
local REJECTED_PREFIX = '!' -- in `joined`, before the id of a pair with a rejected capture
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

local stored_bytes = tonumber(redis.call('HGET', stats, 'bytes') or '0')
local waiting = redis.call('ZCARD', due)
local queued = redis.call('XLEN', ready)
local count = {received = 0, duplicate = 0, late = 0, rejected_pairs = 0, rejected_bytes = 0, joined = 0}
local stored_bytes_before = stored_bytes

-- Moves a pair to the stream, with its last capture, which is not stored in the hash.
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

-- Returns the number of stored captures of a pair, the number of first attempts, and true if the slot is stored. After a
-- failover, a request has a second attempt, which must not count as one of the copies.
local function count_stored(hash, slot)
  local slots = redis.pcall('HKEYS', hash)
  if slots.err then -- not a hash, so not written by Abreast
    redis.call('DEL', hash)
    return 0, 0, false
  end
  local first_attempts, is_stored = 0, false
  for _, stored_slot in ipairs(slots) do
    if string.sub(stored_slot, -2) == ':1' then
      first_attempts = first_attempts + 1
    end
    is_stored = is_stored or stored_slot == slot
  end
  return #slots, first_attempts, is_stored
end

-- Returns the reason to reject a pair, or nil. Waiting pairs reserve bytes for their missing captures, which are assumed
-- to be as large as this one.
local function rejection(pair, size, missing)
  if waiting + queued >= max_pairs or redis.call('ZSCORE', joined, REJECTED_PREFIX .. pair) then
    return 'rejected_pairs'
  end
  if stored_bytes + size + (waiting + 1) * missing * size > max_bytes then
    return 'rejected_bytes'
  end
end

-- Stores one capture and returns the counter for it.
local function store(hash, pair, slot, expected, capture)
  if redis.call('ZSCORE', joined, pair) then
    return 'late'
  end
  local stored, first_attempts, is_stored = count_stored(hash, slot)
  if is_stored then
    return 'duplicate'
  end
  -- A pair is accepted or rejected as a whole: half a pair looks as if a version had not answered. So a further capture
  -- of an accepted pair has room, and bytes are reserved for it.
  if stored == 0 then
    local reason = rejection(pair, #capture, expected - 1)
    if reason then
      redis.call('ZADD', joined, now, REJECTED_PREFIX .. pair)
      return reason
    end
  elseif stored_bytes + #capture > max_bytes then
    return 'rejected_bytes'
  end
  if string.sub(slot, -2) == ':1' then
    first_attempts = first_attempts + 1
  end
  stored_bytes = stored_bytes + #capture
  if first_attempts >= expected then
    move(pair, hash, slot, capture)
    return 'received'
  end
  redis.call('HSET', hash, slot, capture)
  if stored == 0 then
    redis.call('ZADD', due, now + wait_ms, pair)
    waiting = waiting + 1
  end
  return 'received'
end

for i = 5, #KEYS do
  local at = 6 + (i - 5) * 4
  local result = store(KEYS[i], ARGV[at], ARGV[at + 1], tonumber(ARGV[at + 2]), ARGV[at + 3])
  count[result] = count[result] + 1
end

redis.call('ZREMRANGEBYSCORE', joined, '-inf', now - remember_ms)
local excess = redis.call('ZCARD', joined) - max_remembered_ids
if excess > 0 then
  redis.call('ZREMRANGEBYRANK', joined, 0, excess - 1)
end
for name, n in pairs(count) do
  if n > 0 then
    redis.call('HINCRBY', stats, name, n)
  end
end
if stored_bytes ~= stored_bytes_before then
  redis.call('HINCRBY', stats, 'bytes', stored_bytes - stored_bytes_before)
end
return {count.received, count.duplicate, count.late, count.rejected_pairs, count.rejected_bytes}
