-- What the scripts share, put in front of each: the clock, one provider row's gate, its breaker.
-- A script reads everything, decides, and then writes everything. All amounts are whole numbers,
-- below 2^53, and are written with all their digits.

local ROW, FLIGHT, BULK, PROBES, SUSPENDED, CHANGES =
    KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
-- The fleet's settings and the row's limits; and what this call is about.
local POLICY, CALL = cjson.decode(ARGV[1]), cjson.decode(ARGV[2])
local RECORD = 'call:' .. CALL.attempt

local MILLION = 1000000
-- A bucket holds a second of its rate and is refilled so that a full one and sixty seconds stay
-- below the limit, by half a second of rate: the provider's clock is not ours.
local BURST = MILLION / 60
local REFILL = 1 / 60.5 - 1 / 3600
-- The ring says what was taken in the last minute and half a second, to half a second.
local SLOT_US = 500000
local SLOTS = 122
-- Of what there may be a limit: requests, tokens, input and output tokens.
local LIMITS = { POLICY.requests, POLICY.tokens, POLICY.input, POLICY.output }
local REQUESTS, DIMENSIONS = 1, 4
-- Where the numbers of all calls, and those of bulk calls alone, begin in levels and in the ring.
local ALL, BULK_ONLY = { level = 0, ring = 0 }, { level = 4, ring = 3 }

local FIELDS = {
    RECORD, 'last', 'state', 'generation', 'open_until', 'open_us', 'streak', 'window',
    'cooldown', 'throttles', 'throttled_at', 'cap', 'cut_at', 'cut_from', 'took',
    'retries', 'retries_at', 'levels', 'filled', 'ring', 'line:interactive', 'line:bulk',
    'kept:interactive', 'kept:bulk',
}
local row = { state = 'closed', generation = 0, last = 0 }
for i, value in ipairs(redis.call('HMGET', ROW, unpack(FIELDS))) do
    if value then
        row[FIELDS[i]] = tonumber(value) or value
    end
end

local time = redis.call('TIME')
local now = math.max(time[1] * MILLION + time[2] + CALL.offset_us, row.last)

local changed = {}
local changes = {}
local clears_probes = false

local function text(value)
    return type(value) == 'number' and string.format('%d', value) or value
end

-- nil: the field goes.
local function set(name, value)
    row[name] = value
    changed[name] = text(value) or false
end

local function note(kind, account_id, before, after, reason)
    changes[#changes + 1] = { 'kind', kind, 'provider_id', POLICY.provider_id, 'account_id',
        account_id, 'before', before, 'after', after, 'reason', reason }
end

local function live(key)
    return redis.call('ZCOUNT', key, '(' .. text(now), '+inf')
end

local function holds(key, member)
    local lease = redis.call('ZSCORE', key, member)
    return lease and tonumber(lease) > now
end

-- Chance takes or adds a fifth, so that not all rows of a fleet come back at the same moment.
local function spread(us)
    return math.floor(us * (8 * MILLION + 4 * CALL.random_ppm) / (10 * MILLION))
end

-- The breaker. Each transition is a new generation, and probes belong to one.

local function become(state, reason)
    note('breaker', '', row.state, state, reason)
    set('state', state)
    set('generation', row.generation + 1)
    set('streak', nil)
    set('window', nil)
    clears_probes = true
end

local function trip(at, reason)
    local open_us = row.state == 'half_open' and row.open_us * 2 or POLICY.open_us
    open_us = math.min(open_us, POLICY.open_max_us)
    set('open_us', open_us)
    set('open_until', at + spread(open_us))
    become('open', reason)
end

-- A probe whose lease ran out has failed, at that moment, however late somebody looks.
local function settle()
    if row.state == 'half_open' and POLICY.lever ~= 'disabled' then
        local first = redis.call('ZRANGE', PROBES, 0, 0, 'WITHSCORES')
        if first[1] and tonumber(first[2]) <= now then
            trip(tonumber(first[2]), 'a probe was never heard of again')
        end
    end
end

-- The limits

-- Make amounts of each dimension of requests, input and output tokens.
local function by_dimension(requests, input, output)
    return { requests, input + output, input, output }
end

local function limit_of(whose, dimension)
    local limit = LIMITS[dimension]
    if limit and whose == BULK_ONLY then
        return limit * POLICY.bulk_ppm / MILLION
    end
    return limit
end

local levels = row.levels and cjson.decode(row.levels) or {}

-- In millionths, and the most that there can be.
local function level_of(whose, dimension, limit)
    local burst = math.floor(limit * BURST)
    local level = levels[whose.level + dimension]
    if not level then
        return burst, burst
    end
    return math.min(burst, math.floor(level + (now - row.filled) * limit * REFILL)), burst
end

-- All levels are written together, since they share the moment up to which they are filled.
local function set_levels(levels_after)
    local packed = {}
    for _, whose in ipairs({ ALL, BULK_ONLY }) do
        for dimension = 1, DIMENSIONS do
            local limit = limit_of(whose, dimension)
            local after = 'false'
            if limit then
                local level, burst = level_of(whose, dimension, limit)
                after = text(math.min(burst, levels_after(whose, dimension, level, burst)))
            end
            packed[#packed + 1] = after
        end
    end
    set('levels', '[' .. table.concat(packed, ',') .. ']')
    set('filled', now)
end

local function slot_name(slot)
    return 'slot:' .. text(slot % SLOTS)
end

-- For each half second: requests, input and output tokens of all calls, and of bulk calls.
local function set_slot(slot, amounts)
    set(slot_name(slot), string.format('[%d,%d,%d,%d,%d,%d]', unpack(amounts)))
end

-- The same of all slots that were live at the time of the last one; that one's number is first.
local function set_ring(slot, sums)
    set('ring', string.format('[%d,%d,%d,%d,%d,%d,%d]', slot, unpack(sums)))
end

local function commit()
    set('last', now)
    local kept, gone = {}, {}
    for name, value in pairs(changed) do
        if value then
            kept[#kept + 1] = name
            kept[#kept + 1] = value
        else
            gone[#gone + 1] = name
        end
    end
    redis.call('HSET', ROW, unpack(kept))
    if gone[1] then
        redis.call('HDEL', ROW, unpack(gone))
    end
    if clears_probes then
        redis.call('DEL', PROBES)
    end
    for _, fields in ipairs(changes) do
        redis.call('XADD', CHANGES, 'MAXLEN', '~', '10000', '*', unpack(fields))
    end
end
