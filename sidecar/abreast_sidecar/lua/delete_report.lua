#!lua flags=allow-oom
-- Deletes the report of a process unless it has changed. KEYS: reports. ARGV: process, report.
if redis.call('HGET', KEYS[1], ARGV[1]) == ARGV[2] then
  return redis.call('HDEL', KEYS[1], ARGV[1])
end
return 0
