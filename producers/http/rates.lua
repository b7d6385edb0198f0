-- Takes up to `wanted` requests from a caller's bucket.
-- KEYS: the bucket. ARGV: rate a second, burst, wanted, 1 to take what is not there yet, too.
-- Returns how many were taken and, if none, the milliseconds until there is one.
local rate, burst = tonumber(ARGV[1]), tonumber(ARGV[2])
local time = redis.call('TIME')
local now_us = tonumber(time[1]) * 1000000 + tonumber(time[2])
local stored = redis.call('HMGET', KEYS[1], 'level', 'at_us')
local at_us = math.min(tonumber(stored[2]) or now_us, now_us)
local level = math.min(burst, (tonumber(stored[1]) or burst) + (now_us - at_us) * rate / 1000000)
local taken = tonumber(ARGV[3])
if ARGV[4] ~= '1' then taken = math.max(0, math.min(math.floor(level), taken)) end
level = level - taken
redis.call('HSET', KEYS[1], 'level', string.format('%.6f', level),
           'at_us', string.format('%.0f', now_us))
redis.call('PEXPIRE', KEYS[1], math.ceil((burst - level) / rate * 1000) + 1000)
local wait_ms = 0
if taken == 0 then wait_ms = math.ceil((1 - level) / rate * 1000) end
return {taken, wait_ms}
