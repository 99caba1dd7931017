-- Sends the copies of a sampled request once its live response has begun, so that no copy overtakes the live request.
--
-- The routes of sampled requests enable this filter. Their filter context names the clusters of the copies: `shadow`, and
-- `baseline` for a second copy to the version that answers the user. Other routes enable it only to see logins that belong
-- to a connection (NTLM, Negotiate): later requests of such a connection carry no login, so they can't be copied. The
-- metadata of a route name the sampling rule that it belongs to. Each worker thread of Envoy has its own Lua state, and a
-- connection stays on its thread.
-- The configuration defines MAX_BODY_BYTES, MAX_HELD_BYTES, CONNECTION_PER_CLIENT, CONCURRENT_PATHS, BARE (the versions
-- that Envoy captures in any case) and AUTO (those that it captures without a middleware) before this script.

-- Interpret this script: each trace of LuaJIT's compiler would end at a call of Envoy, and entering it costs more than it saves.
jit.off(true, true)

local MAX_HELD_REQUESTS = 10000 -- per thread
local MAX_LOGINS = 10000 -- connections per thread
local MAX_FAILING_SHARE = 0.5 -- of the latest live responses of a version
local QUEUEING_RATIO = 4 -- of the times of the latest live responses to those of many
local FEW, MANY = 16, 512 -- responses, the weights of averages
local STALE_SECONDS = 10
local RECOUNT_SECONDS = 10
local COLLECTION_STEP = 8 -- of the garbage collector: less than 1 ms, with 10,000 requests
local MAX_NUMBER = 0xffffff -- the last number of a sampled request in its stream
local MARKS = {"x-abreast-pair", "x-abreast-copies", "x-abreast-version", "x-abreast-role"}
local METADATA = "abreast"

-- Envoy drops the coroutine of a request together with its stream, and Lua then drops the request, also if its client left.
local held = setmetatable({}, {__mode = "k"}) -- coroutine -> request
local by_pair = setmetatable({}, {__mode = "v"}) -- pair id -> request
local held_bytes, held_requests = 0, 0 -- upper bounds: they include requests whose client left, until the next recount
local last_recount = 0
-- Live requests, averages of their responses, and whether no middleware captured the last response.
local versions = {
  old = {waiting = 0, is_bare = BARE.old, is_auto = AUTO.old},
  new = {waiting = 0, is_bare = BARE.new, is_auto = AUTO.new},
}
local logins, login_count = {}, 0 -- address and port of the client -> true
local stream, sampled = nil, 0 -- the id of this thread's latest sampled requests, and their number

-- Count the held requests again. Lua drops those whose client left at the end of a cycle of its garbage collector. So each
-- call does a part of its work, because a full collection of 10,000 requests would stop the thread for 40 ms.
local function recount()
  if not collectgarbage("step", COLLECTION_STEP) then
    return
  end
  last_recount = os.time()
  held_bytes, held_requests = 0, 0
  versions.old.waiting, versions.new.waiting = 0, 0
  for _, request in pairs(held) do
    if request.headers then
      request.live.waiting = request.live.waiting + 1
      held_bytes, held_requests = held_bytes + request.bytes, held_requests + 1
    end
  end
end

-- Return true if a request may grow by this number of bytes.
local function has_room(bytes)
  if held_bytes + bytes > MAX_HELD_BYTES or held_requests >= MAX_HELD_REQUESTS then
    recount()
  end
  return held_bytes + bytes <= MAX_HELD_BYTES and held_requests < MAX_HELD_REQUESTS
end

local function release(request)
  held_bytes, held_requests = held_bytes - request.bytes, held_requests - 1
  request.live.waiting = request.live.waiting - 1
  request.headers, request.chunks = nil, nil
end

local function count(handle, name)
  handle:stats():counter(name):inc()
end

-- Update the averages of a version with a live response. Times are logarithms, so that a few slow requests weigh little.
local function observe(version, status, milliseconds)
  local time, failed = math.log(milliseconds + 1), status >= 500 and 1 or 0
  if not version.seen then
    version.failing, version.few, version.many, version.count = 0, time, time, 0
  end
  version.seen, version.count = os.time(), version.count + 1
  version.failing = version.failing + (failed - version.failing) / FEW
  version.few = version.few + (time - version.few) / FEW
  version.many = version.many + (time - version.many) / math.min(version.count, MANY)
end

-- Return why a version must get no copies, or nil.
local function find_trouble(version)
  if not version.seen or os.time() - version.seen > STALE_SECONDS then
    return nil
  end
  if version.failing > MAX_FAILING_SHARE then
    return "shed_failing"
  end
  if version.count > MANY and version.few - version.many > math.log(QUEUEING_RATIO) then
    return "shed_queueing"
  end
end

-- Return the headers as a table for httpCall, with the values of a repeated name in order, and their size.
local function copy_headers(headers)
  local copy, bytes = {}, 0
  for name, value in pairs(headers) do
    bytes = bytes + #name + #value
    local present = copy[name]
    if present == nil then
      copy[name] = value
    elseif type(present) == "table" then
      present[#present + 1] = value
    else
      copy[name] = {present, value}
    end
  end
  return copy, bytes
end

local function is_connection_login(value)
  local scheme = value and value:lower():match("^%s*(%a+)")
  return scheme == "ntlm" or scheme == "negotiate"
end

local function remember_login(client)
  if login_count >= MAX_LOGINS then
    logins, login_count = {}, 0
  end
  if not logins[client] then
    logins[client], login_count = true, login_count + 1
  end
end

-- Turn a sampled request into one that is not sampled, so that no capture waits for copies.
local function unmark(handle, reason)
  for _, name in ipairs(MARKS) do
    handle:headers():remove(name)
  end
  count(handle, reason)
end

-- Return the pair id of the next sampled request: a UUID of version 8 with the thread's stream (9 digits), the number of
-- the request in the stream (6 digits), and 62 random bits. The random bits keep the ids of other requests secret. From
-- the number, the ledger knows how many requests were sampled, also after Envoy lost its counters. Ids of a stream grow,
-- so Postgres writes them to the same page of an index.
local function number_pair(unique_id)
  if not stream or sampled == MAX_NUMBER then
    stream, sampled = unique_id:sub(1, 10), 0
  end
  sampled = sampled + 1
  return ("%s%03x-8%03x%s"):format(stream, math.floor(sampled / 4096), sampled % 4096, unique_id:sub(19))
end

local function is_concurrent(path)
  path = path:gsub("[?#].*", "")
  for _, pattern in ipairs(CONCURRENT_PATHS) do
    if path:find(pattern) then
      return true
    end
  end
  return false
end

-- Return the end of x-abreast-copies for a version. If Envoy captures only the other one, it also measures this one.
local function timed_mark(version, opposite)
  return opposite.is_bare and version.is_auto and not version.is_bare and " t" or ""
end

-- Send a copy with the present time in place of the live request's.
local function send_copy(handle, cluster, request, body)
  local version, opposite = request.other, request.live
  if cluster == request.baseline then
    version, opposite = opposite, version
  end
  request.headers["x-abreast-live"] = tostring(request.live.waiting)
  request.headers["x-abreast-copies"] = ("%s %s%s"):format(
    request.copies, handle:timestampString(EnvoyTimestampResolution.MILLISECOND), timed_mark(version, opposite))
  handle:httpCall(cluster, request.headers, body, {asynchronous = true, timeout_ms = 0, send_xff = false})
end

local function send_copies(handle, request)
  local body = request.chunks[1] and table.concat(request.chunks) or nil
  if request.is_query_rule and not is_graphql_query(request.headers, body) then
    request.shadow, request.baseline = nil, nil
    count(handle, "rule." .. request.rule .. ".not_query")
  end
  request.is_query_rule = false -- checked
  local clusters = {request.shadow}
  request.shadow = nil
  if request.has_response and request.baseline then
    -- The second of two copies starts a little later, and both leave Envoy together. So each is the first one in half of
    -- the requests, and neither version seems faster.
    table.insert(clusters, math.random(#clusters + 1), request.baseline)
  end
  for _, cluster in ipairs(clusters) do
    send_copy(handle, cluster, request, body)
  end
  if request.has_response then
    release(request)
  end
end

function envoy_on_request(handle)
  local context = handle:filterContext()
  local shadow = context:get("shadow")
  local is_login = is_connection_login(handle:headers():get("authorization"))
  local client = (is_login or login_count > 0) and handle:streamInfo():downstreamDirectRemoteAddress()
  if is_login then
    remember_login(client)
  end
  if not shadow then
    return
  end
  if logins[client] then
    unmark(handle, "logged_in")
    return
  end
  local headers, bytes = copy_headers(handle:headers())
  local declared = tonumber(headers["content-length"])
  bytes = bytes + (declared or 0)
  if held_requests > 0 and os.time() - last_recount >= RECOUNT_SECONDS then -- clients may have left
    recount()
  end
  if not has_room(bytes) then
    unmark(handle, "over_memory")
    return
  end
  local other, name = "new", "old"
  if not shadow:find("new_shadow$") then
    other, name = name, other
  end
  local trouble = find_trouble(versions[other])
  if trouble then
    unmark(handle, trouble)
    return
  end
  local baseline, concurrent = context:get("baseline"), is_concurrent(headers[":path"])
  trouble = baseline and find_trouble(versions[name])
  if trouble then
    count(handle, "baseline_" .. trouble)
  end
  if baseline and (trouble or concurrent) then -- a second copy measures noise only if both copies leave together
    baseline = nil
    headers["x-abreast-copies"] = headers["x-abreast-copies"]:gsub("^3", "2")
    handle:headers():replace("x-abreast-copies", headers["x-abreast-copies"])
  end
  local mark = timed_mark(versions[name], versions[other])
  if mark ~= "" then
    handle:headers():replace("x-abreast-copies", headers["x-abreast-copies"] .. mark)
  end
  local pair = number_pair(headers["x-abreast-pair"])
  handle:headers():replace("x-abreast-pair", pair)
  headers["x-abreast-pair"] = pair
  count(handle, "sampled." .. stream)
  local rule = handle:metadata():get("rule")
  if rule then
    count(handle, "rule." .. rule .. ".sampled")
  end
  local request = {
    headers = headers,
    copies = headers["x-abreast-copies"]:match("^%d+"),
    bytes = bytes,
    chunks = {},
    shadow = shadow,
    baseline = baseline,
    live = versions[name],
    other = versions[other],
    started_ms = handle:timestamp(),
    is_concurrent = concurrent,
    rule = rule,
    is_query_rule = rule and handle:metadata():get("queries"),
  }
  held_bytes, held_requests = held_bytes + bytes, held_requests + 1
  request.live.waiting = request.live.waiting + 1
  held[coroutine.running()] = request
  by_pair[pair] = request
  handle:streamInfo():dynamicMetadata():set(METADATA, "pair", pair)
  headers["x-envoy-attempt-count"] = "1"
  headers["x-abreast-use"], headers["abreast-shadow"] = nil, nil

  local body_bytes = 0
  for chunk in handle:bodyChunks() do
    local length = chunk:length()
    body_bytes = body_bytes + length
    if body_bytes > MAX_BODY_BYTES or (not declared and not has_room(length)) then
      count(handle, "too_large")
      release(request)
      return
    end
    if length > 0 then
      request.chunks[#request.chunks + 1] = chunk:getBytes(0, length)
      if not declared then
        request.bytes, held_bytes = request.bytes + length, held_bytes + length
      end
    end
  end
  if body_bytes > 0 and not declared then
    headers["x-abreast-framing"] = "chunked" -- httpCall adds a length, which the clusters of the copies remove again
  end
  request.is_complete = true
  if request.is_concurrent or request.has_response then
    send_copies(handle, request)
  end
end

function envoy_on_response(handle)
  if not CONNECTION_PER_CLIENT and is_connection_login(handle:headers():get("www-authenticate")) then
    count(handle, "connection_logins")
  end
  local metadata = handle:streamInfo():dynamicMetadata():get(METADATA)
  local request = metadata and by_pair[metadata.pair]
  if request and request.headers then
    request.has_response = true
    local status = tonumber(handle:headers():get(":status"))
    observe(request.live, status, handle:timestamp() - request.started_ms)
    local is_marked = handle:headers():get("x-abreast-pair")
    local version = versions[handle:headers():get("x-abreast-version")]
    if version and version.is_auto and (is_marked or status < 500) then -- a framework responds with 5xx outside of the middleware
      version.is_bare = not is_marked
    end
    if request.is_complete then
      send_copies(handle, request)
    end
  end
end
