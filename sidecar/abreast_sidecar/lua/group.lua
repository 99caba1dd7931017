#!lua flags=allow-oom
-- Makes the sidecars' group, unless it is there. Also where Redis is at its maxmemory, or nobody could read it empty.
-- KEYS: ready. ARGV: group.
local made = redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
if made.err and not string.find(made.err, 'BUSYGROUP', 1, true) then
  return made
end
return 1
