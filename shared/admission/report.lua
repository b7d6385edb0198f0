-- How an admitted call ended, or that a probe's first token has come. The attempt's place among
-- the calls in flight is the token: a report without it does nothing, so that one counts once.

local FAILURES = { failed = true, overloaded = true, timed_out = true }
local CUTS = { throttled = true, overloaded = true, timed_out = true }
local BUCKETS = 12
local COOLDOWN_DOUBLED_MAX_US = 60 * MILLION
local CUT_EVERY_US = MILLION

local function close(reason)
    set('open_us', nil)
    set('open_until', nil)
    -- Whoever stood in line comes back now, and begins a new one.
    set('line:interactive', nil)
    set('line:bulk', nil)
    become('closed', reason)
end

local is_fed = POLICY.lever ~= 'disabled'

if CALL.outcome == 'first_token' then
    settle()
    local is_current = row.state == 'half_open' and row.generation == CALL.generation
    if is_fed and is_current and holds(PROBES, CALL.attempt) then
        close('a probe was answered')
    end
    if changes[1] then
        commit()
    end
    return 0
end

local call_key = CALL.lane == 'bulk' and BULK or FLIGHT
if not row[RECORD] or not holds(call_key, CALL.attempt) then
    return 0
end
local record = cjson.decode(row[RECORD])
local started_as_probe, was_retry, admitted_at = record[2] == 1, record[3] == 1, record[4]

-- The breaker: only reports of its own generation count, and in half-open only those of probes.

local function count(is_failure)
    local bucket = math.floor(now / POLICY.bucket_us)
    local latest = { calls = 1, failures = is_failure and 1 or 0 }
    local calls, failures = latest.calls, latest.failures
    local window = row.window or ''
    -- It begins with how long a bucket is: those of another length are of no use.
    local kept = { text(POLICY.bucket_us) }
    if string.match(window, '^%d+') ~= kept[1] then
        window = ''
    end
    for at, some, failed in string.gmatch(window, '(%d+):(%d+):(%d+)') do
        at, some, failed = tonumber(at), tonumber(some), tonumber(failed)
        if at > bucket - BUCKETS then
            calls, failures = calls + some, failures + failed
            if at == bucket then
                latest.calls, latest.failures = latest.calls + some, latest.failures + failed
            else
                kept[#kept + 1] = string.format('%d:%d:%d', at, some, failed)
            end
        end
    end
    kept[#kept + 1] = string.format('%d:%d:%d', bucket, latest.calls, latest.failures)
    set('window', table.concat(kept, ' '))
    if not is_failure then
        if row.streak then
            set('streak', nil)
        end
        return
    end
    set('streak', (row.streak or 0) + 1)
    if row.streak >= POLICY.streak then
        trip(now, string.format('%d failures in a row: %s', row.streak, CALL.message))
    elseif calls >= POLICY.min_calls and failures * MILLION >= calls * POLICY.failure_ppm then
        trip(now, string.format('%d of %d calls failed: %s', failures, calls, CALL.message))
    end
end

settle()
local is_current = row.generation == CALL.generation
local is_probe = started_as_probe and row.state == 'half_open' and holds(PROBES, CALL.attempt)
if is_fed and is_current and (FAILURES[CALL.outcome] or CALL.outcome == 'succeeded') then
    local is_failure = CALL.outcome ~= 'succeeded'
    if row.state == 'closed' then
        count(is_failure)
    elseif is_probe and is_failure then
        trip(now, 'a probe failed: ' .. CALL.message)
    elseif is_probe then
        close('a probe was answered')
    end
end

-- Rest: as long as asked for, or longer with each 429 that follows upon a rest.

local function rest(us)
    set('cooldown', math.max(row.cooldown or 0, now + math.min(us, POLICY.cooldown_max_us)))
end

if CALL.outcome == 'throttled' then
    if admitted_at > (row.throttled_at or 0) then
        -- The others of its wave left before anybody knew.
        set('throttles', (row.throttles or 0) + 1)
        set('throttled_at', now)
    end
    if not CALL.cooldown_us then
        local doubled = POLICY.cooldown_us * 2 ^ math.min(row.throttles - 1, 30)
        local longest = math.max(POLICY.cooldown_us, COOLDOWN_DOUBLED_MAX_US)
        rest(spread(math.min(doubled, longest)))
    end
elseif CALL.outcome == 'succeeded' and row.throttles then
    set('throttles', nil)
    set('throttled_at', nil)
end
if CALL.cooldown_us then
    rest(CALL.cooldown_us)
end
local left = CALL.left or {}
local left_of = { left.requests, left.tokens, left.input, left.output }
if left.reset_us then
    for dimension = 1, DIMENSIONS do
        if left_of[dimension] == 0 then
            rest(left.reset_us)
        end
    end
end

-- Concurrency: less when the row cannot bear it, and slowly more again.

if CUTS[CALL.outcome] and is_current and not is_probe then
    local cut_at = row.cut_at or 0
    -- Once for calls that left together, and not more often than every second.
    if admitted_at > cut_at and now - cut_at >= CUT_EVERY_US then
        local in_flight = live(FLIGHT) + live(BULK)
        set('cap', math.max(1, math.floor(in_flight * 0.7)) * MILLION)
        set('cut_from', in_flight)
        set('cut_at', now)
    end
elseif CALL.outcome == 'succeeded' and row.cap then
    set('cap', row.cap + math.floor(MILLION * MILLION / row.cap))
    local cap = row.cap / MILLION
    if cap > 2 * row.cut_from or (POLICY.concurrent and cap >= POLICY.concurrent) then
        set('cap', nil)
        set('cut_from', nil)
    end
end

-- Suspension, for this account alone.

local suspends = CALL.outcome == 'refused'
if suspends and not holds(SUSPENDED, CALL.account) then
    note('suspension', CALL.account, 'active', 'suspended', CALL.message)
end

-- Corrections: what was reserved and not used is there again, what was used beyond it is charged.

local input, output = CALL.used_input or CALL.reserved_input, CALL.used_output or CALL.reserved_output
local requests = 0
if CALL.outcome == 'returned' then
    requests, input, output = -1, 0, 0
    if was_retry then
        set('retries', row.retries + MILLION)
    end
end
local more = { requests, input - CALL.reserved_input, output - CALL.reserved_output }
local more_of = by_dimension(unpack(more))
local reserved_of = by_dimension(1, CALL.reserved_input, CALL.reserved_output)
local is_corrected = more[1] ~= 0 or more[2] ~= 0 or more[3] ~= 0
if row.filled and (is_corrected or CALL.left) then
    set_levels(function(whose, dimension, level)
        if whose == ALL or CALL.lane == 'bulk' then
            level = level - more_of[dimension] * MILLION
        end
        if whose == ALL and left_of[dimension] then
            -- Headers only ever lower it, to where there is room for another call like this one.
            level = math.min(level, (left_of[dimension] - reserved_of[dimension]) * MILLION)
        end
        return level
    end)
end
if row.ring and is_corrected then
    local sums = cjson.decode(row.ring)
    local ring_at = table.remove(sums, 1)
    local slot = math.floor(admitted_at / SLOT_US)
    local here = slot > ring_at - SLOTS and redis.call('HGET', ROW, slot_name(slot))
    if here then
        here = cjson.decode(here)
        for i, amount in ipairs(more) do
            here[i], sums[i] = here[i] + amount, sums[i] + amount
            if CALL.lane == 'bulk' then
                here[i + 3], sums[i + 3] = here[i + 3] + amount, sums[i + 3] + amount
            end
        end
        set_slot(slot, here)
        set_ring(ring_at, sums)
    end
end

if CALL.outcome == 'succeeded' then
    local took = now - admitted_at
    set('took', row.took and row.took + math.floor((took - row.took) / 8) or took)
end
set(RECORD, nil)
commit()
redis.call('ZREM', call_key, CALL.attempt)
if started_as_probe then
    redis.call('ZREM', PROBES, CALL.attempt)
end
if suspends then
    redis.call('ZREMRANGEBYSCORE', SUSPENDED, '-inf', text(now))
    redis.call('ZADD', SUSPENDED, text(now + POLICY.suspension_us), CALL.account)
    redis.call('PEXPIRE', SUSPENDED, text(POLICY.ttl_ms))
end
return 1
