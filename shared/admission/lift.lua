-- Lets an account, or with an empty one all of them, use a provider row again.

local ROW, SUSPENDED, CHANGES = KEYS[1], KEYS[2], KEYS[3]
local PROVIDER_ID, ACCOUNT, REASON, OFFSET_US = ARGV[1], ARGV[2], ARGV[3], ARGV[4]

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2] + OFFSET_US
now = math.max(now, tonumber(redis.call('HGET', ROW, 'last') or 0))
local lifted = 0
for _, account in ipairs(redis.call('ZRANGE', SUSPENDED, 0, -1)) do
    if ACCOUNT == '' or ACCOUNT == account then
        local is_over = tonumber(redis.call('ZSCORE', SUSPENDED, account)) <= now
        redis.call('ZREM', SUSPENDED, account)
        if not is_over then
            lifted = lifted + 1
            redis.call('XADD', CHANGES, 'MAXLEN', '~', '10000', '*', 'kind', 'suspension',
                'provider_id', PROVIDER_ID, 'account_id', account, 'before', 'suspended',
                'after', 'active', 'reason', REASON)
        end
    end
end
return lifted
