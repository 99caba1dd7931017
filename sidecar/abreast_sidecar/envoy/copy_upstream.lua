-- Runs for each copy: drops copies that would queue, restores the framing of the live request, counts the responses of the
-- version, and drops their bodies, which nobody reads.
--
-- Each cluster of copies and each worker thread has its own Lua state. x-abreast-live has the number of sampled live requests
-- in flight on the thread. Copies are about as many if the version keeps up, so a multiple of them means a queue.

jit.off(true, true) -- as in copies.lua

local SPARE_COPIES = 8 -- in flight, for threads with few live requests
local MAX_RATIO = 2 -- copies in flight for each of the most live requests of the last seconds
local MAX_AGE_MS = 2000 -- age of the oldest copy, if more copies than live requests are in flight
local PEAK_SECONDS = 10

-- Envoy drops the coroutine of a copy together with its stream, and Lua then drops the copy, also if it has no response.
local copies = setmetatable({}, {__mode = "k"}) -- coroutine -> copy
local by_pair = setmetatable({}, {__mode = "v"}) -- pair id -> copy
local in_flight = 0 -- upper bound: includes copies without a response until the next recount
local oldest_ms = 0 -- start of the oldest copy at the last recount
local last_recount, peak_start, peak, former_peak = 0, 0, 0, 0

local function recount()
  collectgarbage()
  in_flight, oldest_ms = 0, math.huge
  for _, copy in pairs(copies) do
    if not copy.is_answered then
      in_flight, oldest_ms = in_flight + 1, math.min(oldest_ms, copy.sent_ms)
    end
  end
end

-- Return the most live requests in flight during the last 10 to 20 seconds.
local function track_peak(live)
  local now = os.time()
  if now - peak_start >= PEAK_SECONDS then
    former_peak = now - peak_start < 2 * PEAK_SECONDS and peak or 0
    peak, peak_start = 0, now
  end
  peak = math.max(peak, live)
  return math.max(peak, former_peak)
end

local function is_queueing(live, now_ms)
  local most_live = track_peak(live)
  if in_flight <= most_live then
    return false
  end
  if os.time() ~= last_recount then -- at most once a second
    last_recount = os.time()
    recount()
  end
  return in_flight > most_live and (in_flight >= SPARE_COPIES + MAX_RATIO * most_live or now_ms - oldest_ms > MAX_AGE_MS)
end

function envoy_on_request(handle)
  local headers, now_ms = handle:headers(), handle:timestamp()
  local live = tonumber(headers:get("x-abreast-live")) or 0
  headers:remove("x-abreast-live")
  if is_queueing(live, now_ms) then
    handle:stats():counter("shed"):inc()
    handle:respond({[":status"] = "503"}, "")
    return
  end
  handle:stats():counter("sent"):inc()
  local copy = {sent_ms = now_ms}
  in_flight = in_flight + 1
  copies[coroutine.running()] = copy
  by_pair[headers:get("x-abreast-pair")] = copy
  if headers:get("x-abreast-framing") then
    headers:remove("x-abreast-framing")
    headers:remove("content-length")
  end
end

function envoy_on_response(handle)
  local copy = by_pair[handle:requestHeaders():get("x-abreast-pair")]
  if copy and not copy.is_answered then -- a response of Envoy itself belongs to no copy
    copy.is_answered, in_flight = true, in_flight - 1
    handle:stats():counter("answered"):inc()
  end
  for chunk in handle:bodyChunks() do
    chunk:setBytes("")
  end
end
