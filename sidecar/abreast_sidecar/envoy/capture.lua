-- Captures sampled requests, and sends each with its response to the collector when the response ends.
--
-- The clusters of the versions run this filter next to the codec. It passes headers and chunks on as they arrive. An
-- asynchronous call takes the capture to the collector, so no response waits for it. Each worker thread of Envoy has a
-- separate Lua state for each cluster.
-- If the middleware captures this version, and this script the other one, it also sends the times and the load that it
-- measured, because times of a process and of Envoy can't be compared. The last field of x-abreast-copies asks for them.
-- The configuration defines SERVICE, COLLECTOR, MODE (`auto` or `envoy`), BODY_LIMIT, MAX_HELD_BYTES and DEADLINE_MS
-- before this script.

jit.off(true, true) -- as in copies.lua

local FORMAT = "1"
local METADATA = "abreast.capture"
local CALL_TIMEOUT_MS = 5000 -- the circuit breakers of the collector bound the memory of waiting calls
local CALL_HEADERS = {[":method"] = "POST", [":path"] = "/captures", [":authority"] = "collector"}
local CALL_OPTIONS = {asynchronous = true, timeout_ms = CALL_TIMEOUT_MS, send_xff = false}
local MAX_HELD_CAPTURES = 10000
local MAX_HASHED_BYTES = 8 * 1024 * 1024 -- of a body, a multiple of 8
local COLLECTION_STEP = 8 -- of the garbage collector: less than 1 ms, with 10,000 captures (a full collection: 40 ms)
local MAX_SWEEP_SENDS = 8 -- captures that one request sends for others
local COUNT_SECONDS = 60 -- during which requests are counted after a sampled one
local TIMED_MARK = " t" -- at the end of x-abreast-copies
local TIMES_HEADERS = ":method:GET\n:path:/\nx-abreast-copies:%s\n\n"

-- Envoy drops the coroutine of a request together with its stream, and Lua then drops the entry.
local streams = setmetatable({}, {__mode = "v"}) -- id -> coroutine of a request, until its response begins or is captured
local waiting = 0 -- requests without a response, sampled or not: upper bound, includes those whose client left
local held = {} -- id -> capture whose response has not ended
local by_pair = {} -- pair -> id of the capture of its last attempt
local next_id = 1
local held_bytes, held_count = 0, 0
local has_middleware = false -- in the last response that says so
local last_sampled = os.time() -- in seconds; long after it, requests are not counted
local last_timed = 0 -- in seconds, of a request whose times are sent
local last_sweep = 0 -- in seconds
local due = {} -- ids of captures that the last sweep found to send
local is_collected = false -- a cycle of the garbage collector ended since the last sweep

local function count(handle, name)
  handle:stats():counter(name):inc()
end

local function now_us(handle)
  return tonumber(handle:timestampString(EnvoyTimestampResolution.MICROSECOND))
end

-- A body: its first BODY_LIMIT bytes, its length, and for a longer one a checksum of its first MAX_HASHED_BYTES.
local function new_body()
  return {chunks = {}, kept = 0, length = 0, low = 0, high = 0, hashed = 0, tail = ""}
end

-- Hash blocks of 8 bytes, and keep the rest for the next chunk. A byte-by-byte hash takes six times as long. A difference
-- within one block always changes the hash.
local function hash(body, bytes)
  if body.hashed + #bytes > MAX_HASHED_BYTES then
    bytes = bytes:sub(1, MAX_HASHED_BYTES - body.hashed)
  end
  body.hashed = body.hashed + #bytes
  bytes = body.tail .. bytes
  local low, high, last = body.low, body.high, #bytes - #bytes % 8
  local byte, tobit, lshift, rol, bxor = string.byte, bit.tobit, bit.lshift, bit.rol, bit.bxor
  for at = 1, last, 8 do
    local a, b, c, d, e, f, g, h = byte(bytes, at, at + 7)
    local left = bxor(a, lshift(b, 8), lshift(c, 16), lshift(d, 24))
    local right = bxor(e, lshift(f, 8), lshift(g, 16), lshift(h, 24))
    low = tobit(bxor(rol(low, 5), left) * 31 + right)
    high = tobit(bxor(rol(high, 13), right) * 65599 + low)
  end
  body.low, body.high, body.tail = low, high, bytes:sub(last + 1)
end
jit.on(hash) -- a loop without calls

local function add(capture, body, bytes)
  local room = BODY_LIMIT - body.kept
  if body.length + #bytes > BODY_LIMIT then
    if body.length <= BODY_LIMIT then
      for _, chunk in ipairs(body.chunks) do
        hash(body, chunk)
      end
    end
    hash(body, bytes)
  end
  body.length = body.length + #bytes
  if room > 0 then
    local part = #bytes > room and bytes:sub(1, room) or bytes
    body.chunks[#body.chunks + 1] = part
    body.kept = body.kept + #part
    capture.bytes, held_bytes = capture.bytes + #part, held_bytes + #part
  end
end

local function describe(body)
  local digest = "-"
  if body.length > BODY_LIMIT then
    if body.length <= MAX_HASHED_BYTES then
      hash(body, ("\0"):rep(-#body.tail % 8))
    end
    digest = (body.length > MAX_HASHED_BYTES and "envoy:part:" or "envoy:") .. bit.tohex(body.low) .. bit.tohex(body.high)
  end
  return body.kept .. " " .. body.length .. " " .. digest
end

-- Return the headers as lines, which can't contain a line feed themselves.
local function to_lines(headers)
  local lines = {}
  for name, value in pairs(headers) do
    lines[#lines + 1] = name .. ":" .. value
  end
  lines[#lines + 1] = "\n"
  return table.concat(lines, "\n")
end

local function release(id, capture)
  held[id] = nil
  if by_pair[capture.pair] == id then
    by_pair[capture.pair] = nil
  end
  if capture.first_byte_us then
    streams[id] = nil
  end
  held_bytes, held_count = held_bytes - capture.bytes, held_count - 1
end

-- Send a capture. `state` is complete, truncated (the response goes on), or aborted (it broke off).
local function send(handle, id, capture, state)
  release(id, capture)
  if capture.is_times then
    state = "times"
  end
  local head = table.concat({
    FORMAT, SERVICE, capture.pair, capture.version, capture.role, capture.copies, capture.attempt, state, capture.in_flight,
    string.format("%.0f %.0f %.0f", capture.started_us, capture.first_byte_us or 0, now_us(handle)),
    describe(capture.request), describe(capture.response),
  }, " ")
  local parts = {head, "\n", capture.request_headers, capture.response_headers or "\n", capture.trailers or "\n"}
  for _, body in ipairs({capture.request, capture.response}) do
    for _, chunk in ipairs(body.chunks) do
      parts[#parts + 1] = chunk
    end
  end
  handle:httpCall(COLLECTOR, CALL_HEADERS, table.concat(parts), CALL_OPTIONS)
  count(handle, "sent")
end

-- Count the waiting requests again, and find the captures of copies that broke off, and those that have to leave because
-- their pair would time out. Takes 0.2 ms with 10,000 captures.
local function sweep(handle)
  local now = now_us(handle)
  waiting = 0
  for id in pairs(streams) do
    local capture = held[id]
    if not (capture and capture.first_byte_us) then
      waiting = waiting + 1
    end
  end
  last_sweep, is_collected = os.time(), false
  for id, capture in pairs(held) do
    local is_overdue = now - capture.started_us > DEADLINE_MS * 1000
    if not streams[id] and not capture.first_byte_us then
      release(id, capture) -- the access log captures live requests whose client left
      count(handle, "unfinished")
    elseif not streams[id] or is_overdue then
      due[#due + 1] = id
    end
  end
end

-- Send captures that are due. The next request continues.
local function send_due(handle)
  for _ = 1, math.min(#due, MAX_SWEEP_SENDS) do
    local id = table.remove(due)
    local capture = held[id]
    if capture then
      send(handle, id, capture, streams[id] and "truncated" or "aborted")
    end
  end
end

-- Only the garbage collector shows which streams have ended. So each request does a part of its work, until a cycle ends.
local function collect_and_sweep(handle)
  if waiting + held_count > 0 then
    is_collected = is_collected or collectgarbage("step", COLLECTION_STEP)
    if #due == 0 and os.time() ~= last_sweep then
      sweep(handle)
    end
    send_due(handle)
  end
end

-- A retry shows that Envoy dropped the response to the previous attempt when it saw the status.
local function send_previous_attempt(handle, pair, attempt)
  local id = by_pair[pair]
  local capture = held[id]
  if capture and capture.response_headers and tonumber(capture.attempt) < attempt then
    send(handle, id, capture, "truncated")
  end
end

local function new_capture(headers, started_us, in_flight)
  local lines = to_lines(headers)
  local copies = headers:get("x-abreast-copies") or ""
  return {
    pair = headers:get("x-abreast-pair"),
    version = headers:get("x-abreast-version"),
    role = headers:get("x-abreast-role"),
    copies = copies:match("^%d+") or "0",
    sent_ms = copies:match(" (%d+)") or "",
    attempt = headers:get("x-envoy-attempt-count") or "1",
    in_flight = in_flight,
    started_us = started_us,
    bytes = #lines,
    request_headers = lines,
    request = new_body(),
    response = new_body(),
  }
end

-- Hold a capture under its id. Return false if there is no room.
local function hold(handle, id, capture)
  if held_count >= MAX_HELD_CAPTURES or held_bytes + capture.bytes > MAX_HELD_BYTES then
    count(handle, "over_memory")
    return false
  end
  held[id], by_pair[capture.pair] = capture, id
  held_bytes, held_count = held_bytes + capture.bytes, held_count + 1
  return true
end

-- Keep only the times and the load of a capture.
local function strip(capture)
  held_bytes = held_bytes - capture.bytes
  capture.is_times, capture.bytes = true, 0
  capture.request_headers = TIMES_HEADERS:format(capture.copies .. " " .. capture.sent_ms)
  capture.response_headers = ":status:0\n\n"
  capture.request = new_body()
end

-- Hide from the middleware that times are asked for, so that its capture waits for none.
local function remove_mark(headers)
  local copies = headers:get("x-abreast-copies") or ""
  if copies:sub(-#TIMED_MARK) == TIMED_MARK then
    headers:replace("x-abreast-copies", copies:sub(1, -#TIMED_MARK - 1))
  end
end

-- Return true if this script sends the times of a request besides the capture of the middleware.
local function is_timed(headers)
  if not has_middleware then
    remove_mark(headers)
  elseif (headers:get("x-abreast-copies") or ""):sub(-#TIMED_MARK) == TIMED_MARK then
    last_timed = os.time()
    return true
  end
  return false
end

-- A capture of such a request needs nothing before its response begins.
local function has_no_body(headers)
  local method = headers:get(":method")
  return (method == "GET" or method == "HEAD" or method == "OPTIONS")
    and not headers:get("content-length") and not headers:get("transfer-encoding")
end

function envoy_on_request(handle)
  local headers, id = handle:headers(), next_id
  local pair = headers:get("x-abreast-pair")
  local timed = false
  if pair then
    last_sampled, timed = os.time(), is_timed(headers)
  end
  local is_skipped = has_middleware and os.time() - last_timed > COUNT_SECONDS and (not pair or has_no_body(headers))
  if is_skipped or os.time() - last_sampled > COUNT_SECONDS then
    return -- if the middleware does not capture it after all, its response shows it
  end
  collect_and_sweep(handle)
  local in_flight = waiting
  next_id, waiting = id + 1, waiting + 1
  streams[id] = coroutine.running()
  handle:streamInfo():dynamicMetadata():set(METADATA, "id", id)
  if not pair then
    return
  end
  local attempt = headers:get("x-envoy-attempt-count") or "1"
  if attempt ~= "1" then
    send_previous_attempt(handle, pair, tonumber(attempt) or 1)
  end
  if headers:get("x-abreast-fallback") then
    return -- the cluster of old captures it
  end
  local capture = new_capture(headers, now_us(handle), in_flight)
  capture.is_timed = timed and attempt == "1"
  if not hold(handle, id, capture) then
    remove_mark(headers)
    return
  end
  for chunk in handle:bodyChunks() do
    local length = chunk:length()
    if length > 0 and held[id] then
      add(capture, capture.request, chunk:getBytes(0, length))
    end
  end
end

-- Return true if a middleware captures this response. A framework responds with 5xx to an exception outside of it.
local function is_captured_by_middleware(headers)
  if MODE ~= "auto" then
    return false
  end
  if headers:get("x-abreast-pair") then
    has_middleware = true
  elseif headers:get(":status") < "500" then
    has_middleware = false
  end
  return has_middleware
end

-- Return the id and the capture of a response that a layer outside of the middleware sent, such as a refused login. When its
-- request passed, the middleware was expected to capture it. Its load is unknown, and its start is that of x-abreast-copies.
local function capture_late(handle)
  local headers = handle:requestHeaders()
  if not headers:get("x-abreast-pair") or headers:get("x-abreast-fallback") then
    return nil
  end
  if is_captured_by_middleware(handle:headers()) then
    count(handle, "by_middleware")
    return nil
  end
  if handle:headers():get(":status") >= "500" then
    return nil -- Envoy's own, to a request that did not pass
  end
  local id, capture = next_id, new_capture(headers, 0, "-")
  capture.started_us = capture.sent_ms ~= "" and tonumber(capture.sent_ms) * 1000 or now_us(handle)
  next_id = id + 1
  if hold(handle, id, capture) then
    streams[id] = coroutine.running()
    return id, capture
  end
end

function envoy_on_response(handle)
  local metadata = handle:streamInfo():dynamicMetadata():get(METADATA)
  local id = metadata and metadata.id
  local capture = id and held[id]
  if not id then
    id, capture = capture_late(handle)
  elseif streams[id] then
    waiting = waiting - 1
  else
    return -- released by a sweep
  end
  if not capture then
    if id then
      streams[id] = nil
    end
    return
  end
  if capture.in_flight ~= "-" and is_captured_by_middleware(handle:headers()) then
    count(handle, "by_middleware")
    if not capture.is_timed then
      streams[id] = nil
      release(id, capture)
      return
    end
    strip(capture)
  else
    capture.response_headers = to_lines(handle:headers())
    capture.bytes, held_bytes = capture.bytes + #capture.response_headers, held_bytes + #capture.response_headers
  end
  capture.first_byte_us = now_us(handle)
  for chunk in handle:bodyChunks() do
    local length = chunk:length()
    if not held[id] then
      return -- sent because of its deadline
    end
    if length > 0 and not capture.is_times then
      add(capture, capture.response, chunk:getBytes(0, length))
    end
    if now_us(handle) - capture.started_us > DEADLINE_MS * 1000 then
      send(handle, id, capture, "truncated")
      return
    end
    if held_bytes > MAX_HELD_BYTES then
      release(id, capture)
      count(handle, "over_memory")
      return
    end
  end
  local trailers = handle:trailers()
  if held[id] then
    capture.trailers = not capture.is_times and trailers and to_lines(trailers)
    send(handle, id, capture, "complete")
  end
end
