"""The scripts by which Redis knows who is in a channel. `presence.py` describes their keys.

Each script reads all that it needs before it writes. If memory is short, Redis refuses the first command that writes,
but none after it. So all is done or nothing.
"""

from __future__ import annotations

from wsbroadcast.engines.redis.history import Script

# The common beginning of the scripts of a channel. ARGV: the incarnation, the generation of the server, milliseconds
# after which keys expire, PUBLISH or SPUBLISH, the name, the largest size of an envelope, the channel, and the
# beginning of all keys. The last is empty in a cluster, where this slot has no other keys. A fresh version is a time,
# so that it comes after all others.
_COMMON = """
local call, here, state = redis.call, KEYS[1], KEYS[2]
local inc, ttl, channel, base = ARGV[1], ARGV[3], ARGV[7], ARGV[8]
local leases, entered = base .. ':leases:{' .. base .. '}', base .. ':entered:{' .. base .. '}:'
local known = call('HMGET', state, 'v', 'g')
local version = tonumber(known[1] or 0)
if known[2] ~= ARGV[2] then
  local now = call('TIME')
  version = math.max(version + 1, now[1] * 1000000 + now[2])
end
local function tell(joined, left)
  version = version + 1
  local body = '{"by":' .. cjson.encode(inc) .. ',"joined":{' .. table.concat(joined, ',') ..
    '},"left":[' .. table.concat(left, ',') .. ']}'
  if #body > tonumber(ARGV[6]) then
    version = version + 1
    body = '{"by":"","joined":{},"left":[]}'
  end
  local text = string.format('%.0f', version)
  call('HSET', state, 'v', text, 'g', ARGV[2])
  call(ARGV[4], ARGV[5], '{"v":1,"type":"presence","version":' .. text .. '}\\n' .. body)
  return text
end
local function fetch(names)
  local found = {}
  for at = 1, #names, 1000 do
    local some = call('HMGET', here, unpack(names, at, math.min(at + 999, #names)))
    for number = 1, #some do found[at + number - 1] = some[number] end
  end
  return found
end
local function write(members)
  for at = 1, #members, 1000 do call('HSET', here, unpack(members, at, math.min(at + 999, #members))) end
end
"""

# ARGV goes on with each member and its info. It returns the version if there is a change, the other incarnations if
# this one is new in the channel, and which of the members have joined. If memory is short, a server may have forgotten
# the set of channels that an incarnation has entered. So an incarnation that is new in the channel adds the channel to
# the sets of the others again, so that it is swept.
_ENTER = (
    _COMMON
    + """
local names, joined, told, values, added = {}, {}, {}, {}, 0
for at = 9, #ARGV, 2 do names[#names + 1] = ARGV[at] end
local found = fetch(names)
for number, name in ipairs(names) do
  local was, info = found[number], ARGV[8 + 2 * number]
  local holders = was and string.match(was, '^[^\\n]*')
  if not holders then
    joined[#joined + 1] = number - 1
    told[#told + 1] = cjson.encode(name) .. ':' .. cjson.encode(info)
    holders, added = inc, added + 1
  elseif not string.find(holders, inc, 1, true) then
    holders, added = holders .. ' ' .. inc, added + 1
  end
  local value = holders .. '\\n' .. info
  if value ~= was then
    values[#values + 1] = name
    values[#values + 1] = value
  end
end
local others = {}
if added > 0 then
  local is_new, is_empty = call('HEXISTS', state, 'n' .. inc) == 0, call('EXISTS', here) == 0
  if base ~= '' then
    call('SADD', entered .. inc, channel)
    call('PEXPIRE', entered .. inc, ttl)
    if call('ZADD', leases, 'NX', 0, inc) == 1 then call('PEXPIRE', leases, ttl) end
  end
  for _, name in ipairs(is_new and call('HKEYS', state) or {}) do
    local other = string.match(name, '^n(.+)')
    if other and is_empty then
      call('HDEL', state, name)
    elseif other then
      others[#others + 1] = other
      if base ~= '' then
        call('SADD', entered .. other, channel)
        call('ZADD', leases, 'NX', 0, other)
      end
    end
  end
end
write(values)
if added > 0 then call('HINCRBY', state, 'n' .. inc, added) end
local text = #joined > 0 and tell(told, {}) or ''
for _, at in ipairs(base ~= '' and joined or {}) do
  local index = base .. ':presence:' .. names[at + 1]
  redis.pcall('HSET', index, channel, text)
  redis.pcall('PEXPIRE', index, ttl)
end
call('PEXPIRE', here, ttl)
call('PEXPIRE', state, ttl)
return {text, table.concat(others, ' '), table.concat(joined, ' ')}
"""
)

# ARGV goes on with a cursor, where members of the incarnation are looked for, or nothing; and with members. It returns
# the version if there is a change, how many members the incarnation still has in the channel, the next cursor, and the
# members that have left, as JSON.
_LEAVE = (
    _COMMON
    + """
local cursor, names = ARGV[9], {}
if cursor == '' then
  for at = 10, #ARGV do names[at - 9] = ARGV[at] end
else
  local found = call('HSCAN', here, cursor, 'COUNT', 500)
  cursor = found[1]
  for at = 1, #found[2], 2 do
    if string.find(string.match(found[2][at + 1], '^[^\\n]*'), inc, 1, true) then names[#names + 1] = found[2][at] end
  end
end
local left, told, values, removed, were = {}, {}, {}, 0, fetch(names)
for number, name in ipairs(names) do
  local holders, info = string.match(were[number] or '', '^([^\\n]*)\\n(.*)$')
  if holders and string.find(holders, inc, 1, true) then
    local rest = {}
    for each in string.gmatch(holders, '%S+') do
      if each ~= inc then rest[#rest + 1] = each end
    end
    removed = removed + 1
    if #rest == 0 then
      left[#left + 1] = name
      told[#told + 1] = cjson.encode(name)
    else
      values[#values + 1] = name
      values[#values + 1] = table.concat(rest, ' ') .. '\\n' .. info
    end
  end
end
for at = 1, #left, 1000 do call('HDEL', here, unpack(left, at, math.min(at + 999, #left))) end
write(values)
local rest = tonumber(call('HGET', state, 'n' .. inc) or 0)
if removed > 0 then rest = call('HINCRBY', state, 'n' .. inc, -removed) end
if removed > 0 and rest == 0 and cursor ~= '' then cursor = '0' end
if ARGV[9] == '0' and cursor == '0' then rest = 0 end
if rest <= 0 then
  call('HDEL', state, 'n' .. inc)
  if base ~= '' and (cursor == '' or cursor == '0') then call('SREM', entered .. inc, channel) end
end
local text = #left > 0 and tell({}, told) or ''
for _, name in ipairs(base ~= '' and left or {}) do redis.pcall('HDEL', base .. ':presence:' .. name, channel) end
if call('EXISTS', here) == 1 then
  if removed > 0 then
    call('PEXPIRE', here, ttl)
    call('PEXPIRE', state, ttl)
  end
else
  call('PEXPIRE', state, 600000)
end
return {text, rest, cursor, '[' .. table.concat(told, ',') .. ']'}
"""
)

# ARGV: the generation. A version that somebody asks for is stored, so that the next change has one more. It returns the
# version, and texts of 50 members each, whose parts are separated by a byte that UTF-8 never has. A long list would be
# parsed from its beginning with each piece that arrives, and one long text would take Lua twice as long.
_MEMBERS = """
local call, here, state = redis.call, KEYS[1], KEYS[2]
local version = call('HGET', state, 'v')
if not version then
  local now = call('TIME')
  version = string.format('%.0f', now[1] * 1000000 + now[2])
  call('HSET', state, 'v', version, 'g', ARGV[1])
  call('PEXPIRE', state, 600000)
end
local found, parts = call('HGETALL', here), {version}
for at = 1, #found, 100 do
  parts[#parts + 1] = table.concat(found, '\\255', at, math.min(at + 99, #found))
end
return parts
"""

# KEYS: those of a channel. ARGV: milliseconds, the beginning of the keys, or nothing in a cluster, and the cursor of
# members. It returns the next cursor, and the members.
_TOUCH = """
local call, here = redis.call, KEYS[1]
call('PEXPIRE', here, ARGV[1])
call('PEXPIRE', KEYS[2], ARGV[1])
local found, names = call('HSCAN', here, ARGV[3], 'COUNT', 500), {}
for at = 1, #found[2], 2 do
  if ARGV[2] ~= '' then call('PEXPIRE', ARGV[2] .. ':presence:' .. found[2][at], ARGV[1]) end
  names[#names + 1] = found[2][at]
end
return {found[1], ARGV[2] == '' and table.concat(names, '\\255') or ''}
"""

_NOW = """
local call, leases, time = redis.call, KEYS[1], redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

# ARGV: the incarnation, the one that gets a new lease if that one has none, the milliseconds of the lease, and the
# milliseconds after which keys expire. PEXPIRE needs no memory. It comes first for a lease that still holds, so that
# Redis renews it although memory is short. A new lease is refused then.
_RENEW = (
    _NOW
    + """
local till = call('ZSCORE', leases, ARGV[1])
local inc = till and tonumber(till) > now and ARGV[1] or ARGV[2]
if inc == ARGV[1] then call('PEXPIRE', leases, ARGV[4]) end
call('ZADD', leases, string.format('%.0f', now + ARGV[3]), inc)
call('PEXPIRE', leases, string.format('%.0f', ARGV[4] + ARGV[3]))
return inc
"""
)

_ALIVE = _NOW + "return call('ZRANGEBYSCORE', leases, '(' .. string.format('%.0f', now), '+inf')\n"

_DEAD = _NOW + "return call('ZRANGEBYSCORE', leases, '-inf', string.format('%.0f', now), 'LIMIT', 0, 100)\n"

# KEYS go on with the set of channels that the incarnation has entered. ARGV: the incarnation. If it enters a channel
# later, it is added to the leases again.
_END = (
    _NOW
    + """
local till = call('ZSCORE', leases, ARGV[1])
if till and tonumber(till) <= now and call('EXISTS', KEYS[2]) == 0 then call('ZREM', leases, ARGV[1]) end
return 1
"""
)

# In a cluster. KEYS: the leases, and the set of channels that an incarnation has entered. ARGV: the incarnation, the
# channel, milliseconds.
_LIST = """
redis.call('SADD', KEYS[2], ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
if redis.call('ZADD', KEYS[1], 'NX', 0, ARGV[1]) == 1 then redis.call('PEXPIRE', KEYS[1], ARGV[3]) end
return 1
"""

# In a cluster. KEYS: the channels of a member. ARGV: the channel, the version of a change, what the change was,
# milliseconds. A change that is older than the known one comes too late.
_INDEX = """
local known = redis.call('HGET', KEYS[1], ARGV[1])
if known and tonumber(known) > tonumber(ARGV[2]) then return 0 end
if ARGV[3] == 'left' then return redis.call('HDEL', KEYS[1], ARGV[1]) end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return redis.call('PEXPIRE', KEYS[1], ARGV[4])
"""

ENTER, LEAVE, MEMBERS, TOUCH = Script(_ENTER), Script(_LEAVE), Script(_MEMBERS), Script(_TOUCH)
RENEW, ALIVE, DEAD, END, LIST, INDEX = map(Script, (_RENEW, _ALIVE, _DEAD, _END, _LIST, _INDEX))
