-- An operator's reset: a closed breaker of a new generation, no rest, nothing learned.

local ROW, PROBES, CHANGES = KEYS[1], KEYS[2], KEYS[3]
local PROVIDER_ID, REASON = ARGV[1], ARGV[2]

local state = redis.call('HGET', ROW, 'state') or 'closed'
if redis.call('EXISTS', ROW) == 0 then
    return 0
end
redis.call('HSET', ROW, 'state', 'closed')
redis.call('HINCRBY', ROW, 'generation', 1)
redis.call('HDEL', ROW, 'open_until', 'open_us', 'streak', 'window', 'cooldown', 'throttles',
    'throttled_at', 'cap', 'cut_at', 'cut_from', 'line:interactive', 'line:bulk')
redis.call('DEL', PROBES)
if state ~= 'closed' then
    redis.call('XADD', CHANGES, 'MAXLEN', '~', '10000', '*', 'kind', 'breaker',
        'provider_id', PROVIDER_ID, 'account_id', '', 'before', state, 'after', 'closed',
        'reason', REASON)
end
return 1
