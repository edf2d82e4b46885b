-- The bus on Redis Streams, one operation per call: ARGV = operation, prefix of all keys, lease in ms, arguments (JSON).
-- A script runs whole or not at all, so a client that dies leaves nothing half done.
-- Tasks: a stream per priority and set of requirements ("lane"), its consumer group "crew"; a claim is an entry that is
-- pending, a lease its idle time. Messages: a stream per recipient and priority, its group "mail"; broadcasts: a stream
-- per priority with a group per agent. Entry ids come from one counter, so that streams compare by age.
local operation, prefix, lease, given = ARGV[1], ARGV[2], tonumber(ARGV[3]), cjson.decode(ARGV[4])
local call = redis.call

local function key(...) return prefix .. ':' .. table.concat({...}, ':') end

local function now()
  local time = call('TIME')
  return time[1] .. '.' .. string.format('%06d', time[2])
end

local function group(stream, name)
  redis.pcall('XGROUP', 'CREATE', stream, name, '0', 'MKSTREAM')  -- an error says that it exists
end

local function append(stream, ...)
  return call('XADD', stream, call('INCR', key('entries')) .. '-0', ...)
end

local function number(entry) return tonumber(string.match(entry, '^%d+')) end

local function last_delivered(stream, name)
  for _, info in ipairs(call('XINFO', 'GROUPS', stream)) do
    local fields = {}
    for i = 1, #info, 2 do fields[info[i]] = info[i + 1] end
    if fields['name'] == name then return fields['last-delivered-id'] end
  end
end

-- The oldest entry of a lane that may be handed out: one whose lease is over, or one that never was.
local function oldest(lane)
  local late = call('XPENDING', lane.stream, lane.group, 'IDLE', lease, '-', '+', 1)[1]
  local new = call('XRANGE', lane.stream, '(' .. last_delivered(lane.stream, lane.group), '+', 'COUNT', 1)[1]
  if late and (not new or number(late[1]) < number(new[1])) then
    return {lane = lane, entry = late[1], late = true}
  end
  return new and {lane = lane, entry = new[1]}
end

local function take(found, consumer)
  local lane, entries = found.lane, nil
  if found.late then
    entries = call('XAUTOCLAIM', lane.stream, lane.group, consumer, lease, found.entry, 'COUNT', 1)[2]
  else
    entries = call('XREADGROUP', 'GROUP', lane.group, consumer, 'COUNT', 1, 'STREAMS', lane.stream, '>')[1][2]
  end
  local fields = {}
  for i = 1, #entries[1][2], 2 do fields[entries[1][2][i]] = entries[1][2][i + 1] end
  return fields
end

-- The oldest of the most urgent: lanes are lists of {priority, stream, group}.
local function next_of(lanes)
  local best
  for _, lane in ipairs(lanes) do
    if not best or lane.priority >= best.lane.priority then
      local found = oldest(lane)
      if found and (not best or lane.priority > best.lane.priority or number(found.entry) < number(best.entry)) then
        best = found
      end
    end
  end
  return best
end

-- Tasks

local function task(id, ...) return call('HMGET', key('task', id), ...) end

local function make_ready(id)
  local lane = task(id, 'lane', 'priority')
  local stream = key('lane', lane[1])
  group(stream, 'crew')
  call('ZADD', key('lanes'), lane[2], lane[1])
  call('HSET', key('task', id), 'status', 'READY', 'entry', append(stream, 'task', id))
end

local function settle(id, ...)
  local at = task(id, 'lane', 'entry')
  if at[2] then
    call('XACK', key('lane', at[1]), 'crew', at[2])
    call('XDEL', key('lane', at[1]), at[2])
  end
  call('HSET', key('task', id), ...)
end

local function sink(id, reason)
  local lost = {{id, reason}}
  while #lost > 0 do
    local one = table.remove(lost)
    settle(one[1], 'status', 'FAILED', 'error', one[2], 'finished_at', now())
    for _, waiting in ipairs(call('SMEMBERS', key('waiting', one[1]))) do
      if task(waiting, 'status')[1] == 'WAITING' then lost[#lost + 1] = {waiting, one[1] .. ' failed'} end
    end
  end
end

local function held(id, attempt)
  local at = task(id, 'status', 'attempts')
  return at[1] == 'CLAIMED' and tonumber(at[2]) == attempt
end

local operations = {}

function operations.submit()
  local id = given.id
  local known = task(id, 'spec')[1]
  if known then return known == given.spec and {'ok'} or {'other'} end
  local open, failed = 0, nil
  for _, need in ipairs(given.after) do
    local status = task(need, 'status')[1]
    if not status then return {'unknown', need} end
    if status == 'FAILED' then failed = failed or need end
    if status ~= 'DONE' then open = open + 1 end
  end
  call('HSET', key('task', id), 'spec', given.spec, 'priority', given.priority, 'max_attempts', given.max_attempts,
       'lane', given.priority .. '|' .. table.concat(given.requires, ','), 'status', 'WAITING', 'waits', open,
       'attempts', 0, 'submitted_at', now())
  call('RPUSH', key('tasks'), id)
  for _, need in ipairs(given.after) do
    if task(need, 'status')[1] ~= 'DONE' then call('SADD', key('waiting', need), id) end
  end
  if failed then sink(id, failed .. ' failed') elseif open == 0 then make_ready(id) end
  return {'ok'}
end

local function able_lanes()
  local able, lanes = {}, {}
  for _, name in ipairs(given.able) do able[name] = true end
  local rows = call('ZREVRANGE', key('lanes'), 0, -1, 'WITHSCORES')
  for i = 1, #rows, 2 do
    local fits = true
    for name in string.gmatch(string.match(rows[i], '|(.*)$'), '[^,]+') do fits = fits and able[name] end
    if fits then
      lanes[#lanes + 1] = {priority = tonumber(rows[i + 1]), stream = key('lane', rows[i]), group = 'crew'}
    end
  end
  return lanes
end

function operations.claim()
  while true do
    local found = next_of(able_lanes())
    if not found then return {} end
    local id = take(found, given.agent).task
    local at = task(id, 'attempts', 'max_attempts', 'agent', 'spec')
    if tonumber(at[1]) < tonumber(at[2]) then
      local attempt = call('HINCRBY', key('task', id), 'attempts', 1)
      call('HSET', key('task', id), 'status', 'CLAIMED', 'agent', given.agent, 'claimed_at', now())
      return {at[4], attempt}
    end
    sink(id, 'no sign of life from ' .. at[3] .. ' in attempt ' .. at[1])
  end
end

function operations.renew()
  if not held(given.id, given.attempt) then return {0} end
  local at = task(given.id, 'lane', 'entry', 'agent')
  call('XCLAIM', key('lane', at[1]), 'crew', at[3], 0, at[2], 'JUSTID')
  return {1}
end

function operations.complete()
  local at = task(given.id, 'status', 'attempts')
  if at[1] == 'DONE' and tonumber(at[2]) == given.attempt then return {1} end  -- a client that asked twice
  if not held(given.id, given.attempt) then return {0} end
  settle(given.id, 'status', 'DONE', 'result', given.result, 'finished_at', now())
  for _, waiting in ipairs(call('SMEMBERS', key('waiting', given.id))) do
    local open = call('HINCRBY', key('task', waiting), 'waits', -1)
    if open == 0 and task(waiting, 'status')[1] == 'WAITING' then make_ready(waiting) end
  end
  call('DEL', key('waiting', given.id))
  return {1}
end

function operations.fail()
  if not held(given.id, given.attempt) then return {0} end
  if given.again and given.attempt < tonumber(task(given.id, 'max_attempts')[1]) then
    settle(given.id, 'error', given.reason)
    make_ready(given.id)
  else
    sink(given.id, given.reason)
  end
  return {1}
end

function operations.tasks()
  local found = {}
  for _, id in ipairs(call('LRANGE', key('tasks'), 0, -1)) do found[#found + 1] = call('HGETALL', key('task', id)) end
  return found
end

-- Messages

function operations.send()
  if call('SADD', key('sent'), given.id) == 0 then return {0} end
  local owner = given.to == '*' and 'all' or 'mail:' .. given.to
  call('ZADD', key(owner), given.priority, given.priority)
  local stream = key(owner, given.priority)
  if given.to ~= '*' then group(stream, 'mail') end
  append(stream, 'id', given.id, 'sender', given.sender, 'to', given.to, 'body', given.body, 'priority', given.priority)
  return {1}
end

local function mail_lanes()
  local lanes = {}
  for owner, name in pairs({['mail:' .. given.agent] = 'mail', all = given.agent}) do
    for _, priority in ipairs(call('ZREVRANGE', key(owner), 0, -1)) do
      local stream = key(owner, priority)
      group(stream, name)
      lanes[#lanes + 1] = {priority = tonumber(priority), stream = stream, group = name}
    end
  end
  table.sort(lanes, function(a, b) return a.priority > b.priority end)
  return lanes
end

function operations.receive()
  local found, lanes = {}, mail_lanes()
  while #found < given.limit do
    local one = next_of(lanes)
    if not one then break end
    local fields = take(one, given.agent)
    if fields.sender == given.agent and fields.to == '*' then
      call('XACK', one.lane.stream, one.lane.group, one.entry)
    else
      found[#found + 1] = {fields.id, fields.sender, fields.to, fields.body, fields.priority, one.lane.stream,
                           one.lane.group, one.entry}
    end
  end
  return found
end

function operations.acknowledge()
  call('XACK', given.stream, given.group, given.entry)
  if given.group == 'mail' then call('XDEL', given.stream, given.entry) end
  return {1}
end

return operations[operation]()
