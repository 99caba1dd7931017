-- Stores a batch of captures, joins them to pairs and moves complete pairs to the stream, atomically.
-- KEYS: due, ready, joined, stats, then the hash of the pair for each capture.
-- ARGV: wait_ms, max_pairs, max_bytes, max_remembered_ids, remember_ms, then for each capture its pair id, its slot, the
-- number of captures of the pair, and the encoded capture.
-- Returns the numbers of captures: {received, duplicate, late, rejected_pairs, rejected_bytes}.
-- Each command costs more than the work that it does, so all pairs of a batch share one command where possible.
local due, ready, joined, stats = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local wait_ms, max_pairs, max_bytes = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local max_remembered_ids, remember_ms = tonumber(ARGV[4]), tonumber(ARGV[5])
-- In `joined`, before the id of a pair with a rejected capture. A space and the slot follow for each rejected capture.
local REJECTED_PREFIXES = {rejected_pairs = '!', rejected_bytes = '$'}
local TIMED_OUT_PREFIX = '?' -- in `joined`, before the id of a pair that moved at its deadline
local COUNTERS = {'received', 'duplicate', 'late', 'rejected_pairs', 'rejected_bytes', 'joined'}
local MAX_ARGUMENTS = 3000 -- per command; Lua's stack holds 8000
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

local stored_counts = redis.call('HMGET', stats, 'bytes', unpack(COUNTERS))
local stored_bytes = tonumber(stored_counts[1] or '0')
local stored_bytes_before = stored_bytes
local waiting = redis.call('ZCARD', due)
local queued = redis.call('XLEN', ready)
local count = {received = 0, duplicate = 0, late = 0, rejected_pairs = 0, rejected_bytes = 0, joined = 0}
local repeated = {rejected_pairs = 0, rejected_bytes = 0} -- part of them, which earlier calls have counted

local deadlines = {} -- pair → deadline, to add to `due`
local ended = {} -- pairs to remove from `due`
local moved_hashes = {}
local remembered = {} -- score, id, ... to add to `joined`
local scores = {} -- id → score in `joined`

-- Calls a command with a list of arguments, in parts if it is long, and not at all if it is empty.
local function call(command, key, arguments)
  for first = 1, #arguments, MAX_ARGUMENTS do
    redis.call(command, key, unpack(arguments, first, math.min(first + MAX_ARGUMENTS - 1, #arguments)))
  end
end

local function remember(id)
  remembered[#remembered + 1] = now
  remembered[#remembered + 1] = id
  scores[id] = now
end

local function read_scores()
  local ids = {}
  for at = 6, #ARGV, 4 do
    local pair, slot = ARGV[at], ARGV[at + 1]
    ids[#ids + 1] = pair
    ids[#ids + 1] = TIMED_OUT_PREFIX .. pair
    for _, prefix in pairs(REJECTED_PREFIXES) do
      ids[#ids + 1] = prefix .. pair
      ids[#ids + 1] = prefix .. pair .. ' ' .. slot
    end
    if #ids >= MAX_ARGUMENTS or at + 4 > #ARGV then
      for i, score in ipairs(redis.call('ZMSCORE', joined, unpack(ids))) do
        scores[ids[i]] = score or nil
      end
      ids = {}
    end
  end
end

-- Moves a pair to the stream, with its last capture, which is not stored in the hash.
local function move(pair, hash, slot, capture, parts)
  redis.call('XADD', ready, '*', 'pair', pair, 'why', 'joined', slot, capture, unpack(parts))
  if #parts > 0 then
    moved_hashes[#moved_hashes + 1] = hash
    if deadlines[pair] then
      deadlines[pair] = nil
    else
      ended[#ended + 1] = pair
    end
    waiting = waiting - 1
  end
  remember(pair)
  queued = queued + 1
  count.joined = count.joined + 1
end

-- Returns what a slot counts for: 1 for a first attempt, and the number of times for which it waits. After a failover, a
-- request has a second attempt, which must not count as one of the copies.
local function weigh(slot)
  local ending = string.sub(slot, -2)
  if ending == ':1' then
    return 1, 0
  elseif ending == '1+' then
    return 1, 1
  elseif ending == '1=' then
    return 0, -1
  end
  return 0, 0
end

-- Returns the stored slots and captures of a pair, the number of first attempts, the times that are missing, and true if
-- the slot is stored.
local function read_stored(hash, slot)
  local parts = redis.pcall('HGETALL', hash)
  if parts.err then -- not a hash, so not written by Abreast
    redis.call('DEL', hash)
    return {}, 0, 0, false
  end
  local first_attempts, missing_times, is_stored = 0, 0, false
  for i = 1, #parts, 2 do
    local attempts, times = weigh(parts[i])
    first_attempts, missing_times = first_attempts + attempts, missing_times + times
    is_stored = is_stored or parts[i] == slot
  end
  return parts, first_attempts, missing_times, is_stored
end

-- Returns the reason to reject a pair, or nil: the reason for its other capture, or a limit. Waiting pairs reserve bytes
-- for their missing captures, which are assumed to be as large as this one.
local function rejection(pair, size, missing)
  for reason, prefix in pairs(REJECTED_PREFIXES) do
    if scores[prefix .. pair] then
      return reason
    end
  end
  if waiting + queued >= max_pairs then
    return 'rejected_pairs'
  end
  if stored_bytes + size + (waiting + 1) * missing * size > max_bytes then
    return 'rejected_bytes'
  end
end

-- Remembers a rejected capture. Returns the counter, and true if it was rejected before: the service sent the batch again,
-- because it got no reply.
local function reject(pair, slot, reason)
  local id = REJECTED_PREFIXES[reason] .. pair .. ' ' .. slot
  local is_repeated = scores[id] ~= nil
  remember(id)
  return reason, is_repeated
end

-- Sends a late first attempt after its pair, so that the ledger does not take it for a missing one.
local function send_late(pair, slot, capture)
  if weigh(slot) == 1 and waiting + queued < max_pairs and stored_bytes + #capture <= max_bytes then
    redis.call('XADD', ready, '*', 'pair', pair, 'why', 'late', slot, capture)
    stored_bytes, queued = stored_bytes + #capture, queued + 1
  end
end

-- Stores one capture. Returns the counter for it, and true if an earlier call has counted it.
local function store(hash, pair, slot, expected, capture)
  if scores[pair] then
    return 'late'
  end
  if scores[TIMED_OUT_PREFIX .. pair] then
    send_late(pair, slot, capture)
    return 'late'
  end
  local parts, first_attempts, missing_times, is_stored = read_stored(hash, slot)
  if is_stored then
    return 'duplicate'
  end
  -- A pair is accepted or rejected as a whole: half a pair looks as if a version had not answered. So a further capture
  -- of an accepted pair has room, and bytes are reserved for it.
  if #parts == 0 then
    local reason = rejection(pair, #capture, expected - 1)
    if reason then
      remember(REJECTED_PREFIXES[reason] .. pair)
      return reject(pair, slot, reason)
    end
  elseif stored_bytes + #capture > max_bytes or scores[REJECTED_PREFIXES.rejected_bytes .. pair .. ' ' .. slot] then
    return reject(pair, slot, 'rejected_bytes')
  end
  local attempts, times = weigh(slot)
  first_attempts, missing_times = first_attempts + attempts, missing_times + times
  stored_bytes = stored_bytes + #capture
  if first_attempts >= expected and missing_times <= 0 then
    move(pair, hash, slot, capture, parts)
    return 'received'
  end
  redis.call('HSET', hash, slot, capture)
  if #parts == 0 then
    deadlines[pair] = now + wait_ms
    waiting = waiting + 1
  end
  return 'received'
end

read_scores()
for i = 5, #KEYS do
  local at = 6 + (i - 5) * 4
  local result, is_repeated = store(KEYS[i], ARGV[at], ARGV[at + 1], tonumber(ARGV[at + 2]), ARGV[at + 3])
  count[result] = count[result] + 1
  if is_repeated then
    repeated[result] = repeated[result] + 1
  end
end

local due_members = {}
for pair, deadline in pairs(deadlines) do
  due_members[#due_members + 1] = deadline
  due_members[#due_members + 1] = pair
end
call('ZADD', due, due_members)
call('ZREM', due, ended)
call('DEL', moved_hashes[1], moved_hashes)
call('ZADD', joined, remembered)
redis.call('ZREMRANGEBYSCORE', joined, '-inf', now - remember_ms)
if #remembered > 0 then
  local excess = redis.call('ZCARD', joined) - max_remembered_ids
  if excess > 0 then
    redis.call('ZREMRANGEBYRANK', joined, 0, excess - 1)
  end
end
local totals = {}
for i, name in ipairs(COUNTERS) do
  local new = count[name] - (repeated[name] or 0)
  if new > 0 then
    totals[#totals + 1] = name
    totals[#totals + 1] = string.format('%.0f', tonumber(stored_counts[i + 1] or '0') + new)
  end
end
if stored_bytes ~= stored_bytes_before then
  totals[#totals + 1] = 'bytes'
  totals[#totals + 1] = string.format('%.0f', stored_bytes)
end
call('HSET', stats, totals)
return {count.received, count.duplicate, count.late, count.rejected_pairs, count.rejected_bytes}
