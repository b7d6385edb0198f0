-- May this call leave? Answers {reason, microseconds to wait, generation, whether it is a probe}.
-- Refused means that nothing was taken; admitted twice under one attempt id is admitted once.

-- As `Reason` numbers them.
local BREAKER, COOLDOWN, REQUESTS_FULL, TOKENS_FULL, CONCURRENCY, NO_RETRIES, SUSPENSION =
    1, 2, 3, 4, 5, 6, 7
local BUDGET_SPENT, BUDGET_HELD = 8, 9

local RETRIES_MAX, RETRIES_START = 50 * MILLION, 10 * MILLION
local RETRY_EVERY_US = 5 * MILLION
local PROBE_WAIT_US = MILLION
local KEPT_US = 5 * MILLION
local STEP_MIN_US, LINE_MAX_US = 20000, 900 * MILLION
local TOOK_US = 250000 -- a call, as long as none has been seen
local FORGET_MAX = 100
local HELD_WAIT_US = 250000 -- calls end all the time

local is_bulk = CALL.lane == 'bulk'
local call_key = is_bulk and BULK or FLIGHT
if row[RECORD] and holds(call_key, CALL.attempt) then
    local record = cjson.decode(row[RECORD])
    return { 0, 0, record[1], record[2] }
end

-- The account's budgets, as they were lately. Nothing else is worth asking while one is full.
local spent_until, is_held = 0, false
for _, packed in ipairs(CALL.budgets and redis.call('HVALS', CALL.budgets) or {}) do
    local is_read, budget = pcall(cjson.decode, packed)
    -- One that cannot be read is as good as none: Postgres decides.
    is_read = is_read and type(budget) == 'table' and budget.version
    if is_read and (budget.use_case == cjson.null or budget.use_case == CALL.use_case) then
        for _, window in ipairs({ 'day', 'month' }) do
            local limit, resets_at = budget[window .. '_limit'], budget[window .. '_resets_us']
            if limit ~= cjson.null and now < resets_at then
                local after = budget[window .. '_spent'] + CALL.cost
                if after > limit then
                    spent_until = math.max(spent_until, resets_at)
                elseif after + budget[window .. '_held'] > limit then
                    is_held = true
                end
            end
        end
    end
end
if spent_until > 0 then
    return { BUDGET_SPENT, spent_until - now, row.generation, 0 }
elseif is_held then
    return { BUDGET_HELD, HELD_WAIT_US, row.generation, 0 }
end

settle()

local reason, wait = 0, 0
-- The longest wait is the one that binds: asking after it must not meet the next one.
local function block(code, wait_us)
    wait_us = math.max(1, math.ceil(wait_us))
    if wait_us > wait then
        reason, wait = code, wait_us
    end
end

local is_probe = 0
if POLICY.lever == 'forced_open' then
    block(BREAKER, POLICY.open_max_us)
elseif POLICY.lever == 'auto' and row.state == 'open' then
    if now < row.open_until then
        block(BREAKER, row.open_until - now)
    else
        is_probe = 1
    end
elseif POLICY.lever == 'auto' and row.state == 'half_open' then
    if live(PROBES) >= POLICY.probes then
        block(BREAKER, PROBE_WAIT_US)
    else
        is_probe = 1
    end
end

local suspended_until = tonumber(redis.call('ZSCORE', SUSPENDED, CALL.account) or 0)
if suspended_until > now then
    block(SUSPENSION, suspended_until - now)
end
if row.cooldown and row.cooldown > now then
    block(COOLDOWN, row.cooldown - now)
end

-- Concurrency: what the row allows, or what it was found to bear.
local at_a_time = POLICY.concurrent
if row.cap then
    at_a_time = math.min(at_a_time or math.huge, math.floor(row.cap / MILLION))
end
local slot_free_us = 0
if at_a_time then
    slot_free_us = math.max(STEP_MIN_US, math.min(MILLION, (row.took or TOOK_US) / at_a_time))
    local bulk = live(BULK)
    local bulk_max = math.max(1, math.floor(at_a_time * POLICY.bulk_ppm / MILLION))
    if (is_bulk and bulk >= bulk_max) or bulk + live(FLIGHT) >= at_a_time then
        block(CONCURRENCY, slot_free_us)
    end
end

-- Retries: an empty bucket gets one back every few seconds, so that a lone retry is not stuck.
local retries = row.retries or RETRIES_START
if retries < MILLION then
    local back = math.floor((now - row.retries_at) * MILLION / RETRY_EVERY_US)
    retries = math.min(MILLION, retries + back)
end
if CALL.is_retry and retries < MILLION then
    block(NO_RETRIES, (MILLION - retries) * RETRY_EVERY_US / MILLION)
end

-- Rates: each bucket must have enough, and the last minute room.

-- What all live slots hold, and the names of those that have died since the ring was written.
local slot = math.floor(now / SLOT_US)
local ring_at, sums, stale = slot, { 0, 0, 0, 0, 0, 0 }, {}

local function read_ring()
    if not row.ring then
        return
    end
    local ring = cjson.decode(row.ring)
    ring_at = table.remove(ring, 1)
    for dead = ring_at - SLOTS + 1, math.min(ring_at, slot - SLOTS) do
        stale[#stale + 1] = slot_name(dead)
    end
    if slot - ring_at >= SLOTS then
        return
    end
    sums = ring
    if stale[1] then
        for _, packed in ipairs(redis.call('HMGET', ROW, unpack(stale))) do
            for i, amount in ipairs(packed and cjson.decode(packed) or {}) do
                sums[i] = sums[i] - amount
            end
        end
    end
end

-- How long until all of `full` have room, by the slots that die first.
local function wait_for_ring(full)
    local names = {}
    for live_slot = slot - SLOTS + 1, ring_at do
        names[#names + 1] = slot_name(live_slot)
    end
    local left = { unpack(sums) }
    for i, packed in ipairs(redis.call('HMGET', ROW, unpack(names))) do
        for j, amount in ipairs(packed and cjson.decode(packed) or {}) do
            left[j] = left[j] - amount
        end
        for _, one in ipairs(full) do
            local from = one.whose.ring
            local amounts = by_dimension(left[from + 1], left[from + 2], left[from + 3])
            if not one.wait_us and amounts[one.dimension] <= one.room then
                one.wait_us = (slot + i) * SLOT_US - now
                block(one.code, one.wait_us)
            end
        end
    end
end

-- Room for a large call: one that found none lowers, for a moment, how far the calls of its lane
-- fill the ring, to where it fits itself. Else smaller ones would keep it out for ever.
local function kept_for(lane)
    local kept = row['kept:' .. lane] and cjson.decode(row['kept:' .. lane])
    return kept and kept[1] > now and { 0, kept[2], kept[3], kept[4] } or { 0, 0, 0, 0 }
end

local needs = by_dimension(1, CALL.input, CALL.output)
local is_limited = LIMITS[1] or LIMITS[2] or LIMITS[3] or LIMITS[4]
local full, kept, kept_by_voice = {}, nil, nil
local step = 0
if is_limited then
    read_ring()
    kept = kept_for(CALL.lane)
    kept_by_voice = is_bulk and kept_for('interactive') or kept
    for _, whose in ipairs(is_bulk and { ALL, BULK_ONLY } or { ALL }) do
        local from = whose.ring
        local spent = by_dimension(sums[from + 1], sums[from + 2], sums[from + 3])
        for dimension = 1, DIMENSIONS do
            local limit = limit_of(whose, dimension)
            if limit then
                local code = dimension == REQUESTS and REQUESTS_FULL or TOKENS_FULL
                local need = needs[dimension]
                local level = level_of(whose, dimension, limit)
                -- One threshold for large and small: neither can starve the other.
                if level < 0 then
                    block(code, -level / (limit * REFILL) + 1)
                end
                local reach = math.max(need, kept[dimension])
                if whose == ALL then
                    reach = math.max(reach, kept_by_voice[dimension])
                end
                -- What is larger than the limit goes alone.
                if spent[dimension] > 0 and spent[dimension] + reach > limit then
                    full[#full + 1] = { code = code, whose = whose, dimension = dimension,
                        room = math.max(0, limit - reach) }
                end
                step = math.max(step, need / (limit * REFILL) * MILLION)
            end
        end
    end
    if full[1] then
        wait_for_ring(full)
    end
end

if POLICY.lever == 'forced_open' then
    reason = BREAKER -- nothing else can be waited for
end
if not CALL.take then
    return { reason, wait, row.generation, reason == 0 and is_probe or 0 }
end

if reason > 0 then
    for _, one in ipairs(full) do
        local need = needs[one.dimension]
        if one.code == TOKENS_FULL and need >= kept[one.dimension] then
            kept[one.dimension] = need
            local kept_until = now + one.wait_us + KEPT_US
            set('kept:' .. CALL.lane,
                string.format('[%d,%d,%d,%d]', kept_until, kept[2], kept[3], kept[4]))
        end
    end
    if CALL.line_up and reason ~= NO_RETRIES and reason ~= SUSPENSION then
        local line = 'line:' .. CALL.lane
        local from = now
        if reason == BREAKER or reason == COOLDOWN then
            -- Nobody gets in before that, so that is where the line begins.
            from = now + wait
        end
        if reason ~= REQUESTS_FULL and reason ~= TOKENS_FULL then
            step = math.max(step, STEP_MIN_US, slot_free_us)
        end
        local turn = math.max(row[line] or 0, from) + math.ceil(step)
        set(line, math.min(turn, now + LINE_MAX_US))
        wait = math.max(wait, row[line] - now)
    end
    commit()
    redis.call('PEXPIRE', ROW, text(POLICY.ttl_ms))
    return { reason, wait, row.generation, 0 }
end

if is_probe == 1 and row.state == 'open' then
    become('half_open', 'its time was over')
end
set(RECORD, string.format('[%d,%d,%d,%d]', row.generation, is_probe, CALL.is_retry and 1 or 0, now))
if CALL.is_retry then
    set('retries', retries - MILLION)
else
    set('retries', math.min(RETRIES_MAX, retries + POLICY.retry_ppm))
end
set('retries_at', now)

if step > 0 then
    set_levels(function(whose, dimension, level, burst)
        if whose == BULK_ONLY and not is_bulk then
            return level
        end
        local need = needs[dimension] * MILLION
        if need > burst and is_bulk and whose == ALL then
            -- It is the bulk lane's debt: voice does not wait until it is paid.
            return math.min(level, 0)
        end
        -- The call may go into debt, so a burst has to leave it room.
        return math.min(level, math.max(0, burst - need)) - need
    end)
    local here = ring_at == slot and redis.call('HGET', ROW, slot_name(slot))
    here = here and cjson.decode(here) or { 0, 0, 0, 0, 0, 0 }
    for i, amount in ipairs({ 1, CALL.input, CALL.output }) do
        here[i], sums[i] = here[i] + amount, sums[i] + amount
        if is_bulk then
            here[i + 3], sums[i + 3] = here[i + 3] + amount, sums[i + 3] + amount
        end
    end
    for _, name in ipairs(stale) do
        set(name, nil)
    end
    set_slot(slot, here)
    set_ring(slot, sums)
end

-- Calls whose lease ran out are gone; what they reserved stays taken, since nobody knows.
local lost = redis.call('ZRANGEBYSCORE', call_key, '-inf', text(now), 'LIMIT', 0, FORGET_MAX)
for _, attempt in ipairs(lost) do
    redis.call('ZREM', call_key, attempt)
    set('call:' .. attempt, nil)
end
commit()

local lease = text(now + POLICY.lease_us)
redis.call('ZADD', call_key, lease, CALL.attempt)
redis.call('PEXPIRE', call_key, text(POLICY.ttl_ms))
if is_probe == 1 then
    redis.call('ZADD', PROBES, lease, CALL.attempt)
    redis.call('PEXPIRE', PROBES, text(POLICY.ttl_ms))
end
redis.call('PEXPIRE', ROW, text(POLICY.ttl_ms))
return { 0, 0, row.generation, is_probe }
