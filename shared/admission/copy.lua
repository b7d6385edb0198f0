-- Keep the copy of a budget, unless a later one is there already.

local KEY, COPIED = KEYS[1], KEYS[2]
local ACCOUNT, ID, VERSION, COPY = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]

local known = redis.call('HGET', KEY, ID)
local is_read, copy = pcall(cjson.decode, known or '')
if is_read and type(copy) == 'table' and (tonumber(copy.version) or -1) >= VERSION then
    return 0
end
redis.call('HSET', KEY, ID, COPY)
redis.call('SADD', COPIED, ACCOUNT)
return 1
