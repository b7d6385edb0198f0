-- Keeps the slots and probe permits of attempts in flight; what is gone does not come back.

local ROW, FLIGHT, BULK, PROBES = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local OFFSET_US, LEASE_US, TTL_MS = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3]

local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2]) + OFFSET_US
now = math.max(now, tonumber(redis.call('HGET', ROW, 'last') or 0))

local found = {}
for i = 4, #ARGV do
    for _, key in ipairs({ FLIGHT, BULK, PROBES }) do
        local lease = redis.call('ZSCORE', key, ARGV[i])
        if lease and tonumber(lease) > now then
            found[#found + 1] = { key, ARGV[i] }
        end
    end
end
for _, one in ipairs(found) do
    redis.call('ZADD', one[1], string.format('%.0f', now + LEASE_US), one[2])
    redis.call('PEXPIRE', one[1], TTL_MS)
end
if found[1] then
    redis.call('HSET', ROW, 'last', string.format('%.0f', now))
    redis.call('PEXPIRE', ROW, TTL_MS)
end
return #found
