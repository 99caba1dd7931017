#!lua flags=no-writes
-- Reads the age of the oldest entry of a stream. Entries leave the stream when they are in the ledger.
-- KEYS: ready. Returns milliseconds by the clock of Redis, 0 for an empty stream.
local entries = redis.pcall('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)
if entries.err or #entries == 0 then
  return 0
end
local clock = redis.call('TIME')
local added_ms = tonumber(string.match(entries[1][1], '^%d+'))
return math.max(0, clock[1] * 1000 + math.floor(clock[2] / 1000) - added_ms)
