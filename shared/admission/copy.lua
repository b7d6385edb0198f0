-- Keep the copy of a budget, unless a later one is there already.

local KEY, ID, VERSION, COPY = KEYS[1], ARGV[1], tonumber(ARGV[2]), ARGV[3]

local known = redis.call('HGET', KEY, ID)
if known and cjson.decode(known).version >= VERSION then
    return 0
end
redis.call('HSET', KEY, ID, COPY)
return 1
