-- Everything that replicas of the gateway run inside Redis or Valkey: one script, so that each operation is one
-- atomic step. ARGV[1] names the operation, the other arguments are its own. Times are the server's, in milliseconds.

local operations = {}

local function now()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Checks that the server can be written to. Returns its time.
operations.check = function(keys)
  redis.call('SET', keys[1], '1', 'PX', 10000)
  return now()
end

-- Documents -----------------------------------------------------------------------------------------------------------
--
-- A hash with `version` and `content`. A key that is none, or that has another version, counts as no document.

local function version_of(name)
  local found = redis.pcall('HGET', name, 'version')
  if found == false and redis.call('EXISTS', name) == 0 then
    return 0
  end
  return type(found) == 'string' and #found < 16 and string.match(found, '^%d+$') and tonumber(found) or nil
end

-- Returns the version, the content, and the server's time. Content of more than `most` bytes is left out.
operations.read_document = function(keys, arguments)
  local version, content, most = version_of(keys[1]), '', tonumber(arguments[1])
  if version and redis.call('HSTRLEN', keys[1], 'content') <= most then
    content = redis.call('HGET', keys[1], 'content') or ''
  end
  return {version or 0, content, now()}
end

-- Replaces the document if its version is still the given one, and tells the channel of the same name. Versions are
-- times where possible, so that they go on rising if the data was lost.
operations.write_document = function(keys, arguments)
  local version = version_of(keys[1])
  if (version or 0) ~= tonumber(arguments[1]) then
    return 0
  end
  if not version then
    redis.call('DEL', keys[1])
  end
  local next_version = string.format('%.0f', math.max((version or 0) + 1, now()))
  redis.call('HSET', keys[1], 'version', next_version, 'content', arguments[2])
  redis.call('PUBLISH', keys[1], next_version)
  return 1
end

-- Limits of keys ------------------------------------------------------------------------------------------------------
--
-- The hash of a limit has, for each replica, what it may use ("held"), what it has used, and when it said so.

local SILENT = 5000       -- a replica that was not heard for so long has lost what it holds and has not used
local ALIVE = 10000       -- time for which a replica that was heard counts as one
local LIVES = {           -- time for which the use of a replica counts that is not heard any more
  requests = 61000, tokens = 61000, running = 10000, day = 172800000
}

local function sum_of_others(name, me, before, life, at)
  local flat, held, used, earlier = redis.call('HGETALL', name), 0, 0, 0
  for index = 1, #flat, 2 do
    local replica = flat[index]
    local holds, uses, heard = string.match(flat[index + 1], '^(%d+) (%d+) (%d+)$')
    if replica ~= me then
      local age = math.abs(at - (tonumber(heard) or -life))
      if age >= life then
        redis.call('HDEL', name, replica)
      elseif replica == before then
        earlier = tonumber(uses)
        redis.call('HDEL', name, replica)
      else
        held = held + math.max(tonumber(uses), age > SILENT and 0 or tonumber(holds))
        used = used + tonumber(uses)
      end
    end
  end
  return held, used, earlier
end

-- Records the replica's use of limits. For each key but the first, which counts the replicas, it has the arguments
-- kind, limit, use, wanted quota, and the largest amount that one request waits for. Returns the number of replicas,
-- and for each limit the quota, what the others have used and hold, and what the predecessor has used besides.
operations.share_limits = function(keys, arguments)
  local me, before, at = arguments[1], arguments[2], now()
  redis.call('ZADD', keys[1], at, me)
  redis.call('ZREMRANGEBYSCORE', keys[1], '-inf', at - ALIVE)
  local answer = {redis.call('ZCARD', keys[1])}
  for index = 2, #keys do
    local first = 3 + (index - 2) * 5
    local kind, limit, use = arguments[first], tonumber(arguments[first + 1]), tonumber(arguments[first + 2])
    local wanted, largest = tonumber(arguments[first + 3]), tonumber(arguments[first + 4])
    local life = LIVES[kind]
    local held, used, earlier = sum_of_others(keys[index], me, kind == 'day' and before or '', life, at)
    earlier = math.max(0, earlier - use)
    use, wanted = use + earlier, wanted + earlier
    local quota = math.max(use, math.min(wanted, limit - held))
    if held == 0 and use == 0 then
      quota = math.max(quota, largest)  -- a request that exceeds the limit by itself, or it would be refused for ever
    end
    if quota == 0 then
      redis.call('HDEL', keys[index], me)
    else
      redis.call('HSET', keys[index], me, string.format('%.0f %.0f %.0f', quota, use, at))
      redis.call('PEXPIRE', keys[index], life + 1000)
    end
    for _, number in ipairs({quota, used, held, earlier}) do
      answer[#answer + 1] = number
    end
  end
  return answer
end

-- Usage ---------------------------------------------------------------------------------------------------------------
--
-- The hash of a day has the sums of each replica's file. The set `usage:days` has the days.

-- Replaces the sums of one file. Its arguments are the name of the file, the day, the sums, and the days' life in seconds.
operations.write_usage = function(keys, arguments)
  redis.call('HSET', keys[1], arguments[1], arguments[3])
  redis.call('EXPIRE', keys[1], arguments[4])
  redis.call('SADD', keys[2], arguments[2])
  redis.call('EXPIRE', keys[2], arguments[4])
  return 1
end

-- Returns the days, of which some may be over.
operations.usage_days = function(keys)
  return redis.call('SMEMBERS', keys[1])
end

-- Returns the sums of all files but one.
operations.read_usage = function(keys, arguments)
  local found = {}
  for _, name in ipairs(keys) do
    local flat = redis.call('HGETALL', name)
    for index = 1, #flat, 2 do
      if flat[index] ~= arguments[1] then
        found[#found + 1] = flat[index + 1]
      end
    end
  end
  return found
end

-- Returns for each day whether the sums of a file are there.
operations.has_usage = function(keys, arguments)
  local found = {}
  for index, name in ipairs(keys) do
    found[index] = redis.call('HEXISTS', name, arguments[1])
  end
  return found
end

-- Leases ------------------------------------------------------------------------------------------------------------
--
-- A replica that shares limits is a member. The hash `members` has, for each, when it was last heard ("seen"), the
-- number of its last report, and whether it is leaving. The hash of a limit has a record of each member:
--
--   held      slots that no other member may use: those that it may fill, or still has running
--   demand    slots that it could use now: running and queued requests
--   turn      when one of its requests last began under this limit
--   starts    its counter of requests that began
--   total     the limit as its own settings have it
--   adaptive  1 if the limit is learned
--   low       answers that streamed at the same time during its whole last second (adaptive limits)
--   at        time of the record
--   leaving   1 if it takes no new work
--   told      slots up to which it was told to fill
--   contest   what it was told about the demand of others
--
-- The sum of `held` never exceeds the limit, but for what ran before: requests of a member that was not heard for a
-- while and is heard again, and those that run when a limit is lowered. A member that is told to use fewer slots
-- keeps them in `held` until it reports that it does.

local TTL = 5000          -- a member that was not heard for so long has lost its slots
local QUIET = 2500        -- if nobody was heard for so long, the data may be old
local RECOVERY = 2500     -- time in which every member reports what it holds, while nobody gets more
local ROTATION = 2000     -- slots that are left over after equal shares go round at this interval
local FORGET = 3600000    -- time after which a limit that nobody reports is forgotten
local RETRY = 60000       -- pause after an adaptive limit was found right
local FRESH = 1000        -- age up to which the reports of streaming answers overlap

local WANTED, TURNS = 1, 2  -- others wait for slots; and there are fewer slots than members that wait

local FIELDS = {'held', 'demand', 'turn', 'starts', 'total', 'adaptive', 'low', 'at', 'leaving', 'told', 'contest'}

local function pack(record)
  local values = {}
  for index, field in ipairs(FIELDS) do
    values[index] = string.format('%.0f', record[field])
  end
  return table.concat(values, ' ')
end

local function unpack_numbers(text, fields)
  local record, index = {}, 1
  for number in string.gmatch(text, '%S+') do
    record[fields[index]] = tonumber(number)
    index = index + 1
  end
  return record
end

local function by_id(first, second)
  return first.id < second.id
end

-- Returns the fields of a hash that are members' (by id) and the others.
local function read_hash(name, fields)
  local flat, members, others = redis.call('HGETALL', name), {}, {}
  for index = 1, #flat, 2 do
    local field = flat[index]
    if string.sub(field, 1, 1) == '#' then
      others[field] = flat[index + 1]
    else
      members[field] = unpack_numbers(flat[index + 1], fields)
      members[field].id = field
    end
  end
  return members, others
end

-- Returns the members by id, and the time for which all have yet to report, or 0. A clock that was set counts as a
-- silence.
local function read_members(name, at)
  local members, others = read_hash(name, {'seen', 'sequence', 'leaving'})
  local age
  for _, member in pairs(members) do
    age = math.min(age or math.huge, math.abs(at - member.seen))
  end
  local until_time = tonumber(others['#recovery'])
  if not until_time or until_time > at + RECOVERY or (age and age > QUIET) then
    until_time = at + RECOVERY
    redis.call('HSET', name, '#recovery', string.format('%.0f', until_time))
  end
  local recovery = math.max(0, until_time - at)
  for id, member in pairs(members) do
    if recovery == 0 and math.abs(at - member.seen) > TTL then
      members[id] = nil
      redis.call('HDEL', name, id)
    end
  end
  return members, recovery
end

-- Returns the records of the living members, without those of others.
local function read_limit(name, members)
  local records, others = read_hash(name, FIELDS)
  for id in pairs(records) do
    if not members[id] then
      records[id] = nil
      redis.call('HDEL', name, id)
    end
  end
  return records, others
end

-- Sets the target of each record: the slots that are its by demand, and an equal part of those that nobody demands.
-- Of members that all want more than an equal share (max-min fairness), those get the slots that are left over
-- whose turn was longest ago, or, if each has some, each in turn for a while. Returns whether members take turns.
local function set_targets(records, total, at)
  local sorted, left, turns = {}, total, false
  for _, record in pairs(records) do
    sorted[#sorted + 1] = record
  end
  table.sort(sorted, function(first, second)
    if first.demand ~= second.demand then
      return first.demand < second.demand
    end
    return first.id < second.id
  end)
  for index, record in ipairs(sorted) do
    local count = #sorted - index + 1
    local share = math.floor(left / count)
    if record.demand > share then
      local rest = {unpack(sorted, index)}
      local extra = left - share * count
      turns = share == 0
      table.sort(rest, function(first, second)
        if turns and first.turn ~= second.turn then
          return first.turn < second.turn
        end
        return first.id < second.id
      end)
      local offset = turns and 0 or math.floor(at / ROTATION) % count
      for place = 0, count - 1 do
        rest[(place + offset) % count + 1].target = share + (place < extra and 1 or 0)
      end
      left = 0
      break
    end
    record.target = record.demand
    left = left - record.demand
  end
  if left > 0 then
    table.sort(sorted, by_id)
    local staying = {}
    for _, record in ipairs(sorted) do
      if record.leaving == 0 then
        staying[#staying + 1] = record
      end
    end
    for index, record in ipairs(staying) do
      record.target = record.target + math.floor(left / #staying) + (index <= left % #staying and 1 or 0)
    end
  end
  return turns
end

local function sum_held(records)
  local sum = 0
  for _, record in pairs(records) do
    sum = sum + record.held
  end
  return sum
end

-- Collects, by member, the numbers of the limits that it should report on now.
local function wake(wakes, id, number)
  wakes[id] = wakes[id] or {}
  table.insert(wakes[id], number)
end

local function publish(wakes, keys, prefix)
  for id, numbers in pairs(wakes) do
    local names = {}
    for index, number in ipairs(numbers) do
      names[index] = keys[number]
    end
    redis.call('PUBLISH', prefix .. id, table.concat(names, '\n'))
  end
end

-- Wakes the members that can have slots which are free.
local function offer(wakes, records, free, number, except)
  for id, record in pairs(records) do
    if free > 0 and id ~= except and record.demand > record.held and record.target > record.held then
      wake(wakes, id, number)
    end
  end
end

-- Returns the limit: the smallest that a member has, and the one that was learned last.
local function total_of(records, others)
  local total, learned = nil, tonumber(others['#total'])
  for _, record in pairs(records) do
    local own = record.adaptive == 1 and learned or record.total
    total = math.min(total or own, own)
  end
  return total
end

-- Updates what was learned about an adaptive limit with a member's report.
local function learn(records, others, mine, report, at, may_try)
  local total, version = tonumber(others['#total']), tonumber(others['#version'] or '0')
  local changes = {}
  local function change(value, pause)
    total, version = value, version + 1
    changes['#total'], changes['#version'], changes['#next'] = total, version, at + pause
    changes['#trial'] = ''
  end
  if not total or report.version > version then
    total, version = report.total, report.version
    changes['#total'], changes['#version'] = total, version
  elseif report.proposal > 0 and report.version == version and report.proposal ~= total then
    change(report.proposal, report.proposal < total and RETRY or 0)
  end
  local low = 0
  for _, record in pairs(records) do
    if at - record.at <= FRESH then
      low = low + record.low
    end
  end
  if low > total then
    change(low, 0)
  end
  local trial = changes['#trial'] or others['#trial'] or ''
  if trial == mine.id and report.trial ~= 1 then
    trial = ''
    if report.trial == 2 then
      changes['#next'] = at + RETRY
    end
  elseif trial ~= '' and not records[trial] then
    trial = ''
  end
  local running = 0
  for _, record in pairs(records) do
    running = running + math.min(record.held, record.demand)
  end
  local next_trial = tonumber(changes['#next'] or others['#next'] or '0')
  if may_try and trial == '' and running >= total and report.count >= mine.held and report.demand > report.count
    and (at >= next_trial or next_trial > at + RETRY) then
    trial = mine.id
  end
  changes['#trial'] = trial
  for field, value in pairs(changes) do
    value = type(value) == 'number' and string.format('%.0f', value) or value
    others[field], changes[field] = value, value
  end
  return changes, trial == mine.id and 1 or 0
end

local REPORT = {'total', 'adaptive', 'held', 'count', 'demand', 'starts', 'low', 'version', 'proposal', 'trial'}

-- Reports a member's use of limits, and returns what it may use.
--
-- keys: members, then the limits. Arguments: the member's id, the number of the report, 1 if it is leaving, the
-- prefix of the channels on which members are woken, and ten numbers for each limit (REPORT).
--
-- Returns the time, the number of members, this one's place among them, the milliseconds until the end of a
-- recovery or 0, then for each limit: the slots that the member may fill, what it may expect, the contest, the limit,
-- the version of a learned limit, the slots that others hold, and 1 if it may try one slot more.
-- Returns an empty list if a later report has been handled.
operations.report = function(keys, arguments)
  local at, id, sequence = now(), arguments[1], tonumber(arguments[2])
  local members, recovery = read_members(keys[1], at)
  if members[id] and sequence <= members[id].sequence then
    return {}
  end
  members[id] = {id = id, seen = at, sequence = sequence, leaving = tonumber(arguments[3])}
  redis.call('HSET', keys[1], id, string.format('%.0f %.0f %.0f', at, sequence, members[id].leaving))
  local ids, place = {}, 0
  for other, member in pairs(members) do
    if member.leaving == 0 then
      ids[#ids + 1] = other
    end
  end
  table.sort(ids)
  for index, other in ipairs(ids) do
    if other == id then
      place = index - 1
    end
  end
  local answer, wakes = {at, #ids, place, recovery}, {}

  for number = 2, #keys do
    local report = {}
    for index, field in ipairs(REPORT) do
      report[field] = tonumber(arguments[4 + (number - 2) * #REPORT + index])
    end
    local records, others = read_limit(keys[number], members)
    local old = records[id]
    local mine = {
      id = id, held = report.held, demand = math.max(report.demand, report.count), starts = report.starts,
      turn = old and old.starts == report.starts and old.turn or at, total = report.total,
      adaptive = report.adaptive, low = report.low, at = at, leaving = members[id].leaving,
      told = old and old.told or 0, contest = old and old.contest or 0,
    }
    records[id] = mine
    local changes, trial = {}, 0
    if mine.adaptive == 1 then
      changes, trial = learn(records, others, mine, report, at, recovery == 0)
    end
    local total = total_of(records, others)
    if recovery == 0 and mine.held > (old and old.held or 0) then
      -- It was not heard for a while: of what it held, the others may have taken all but what runs.
      mine.held = math.max(report.count, math.min(mine.held, total - sum_held(records) + mine.held))
    end
    local turns = set_targets(records, total, at)
    local free = total - sum_held(records)
    if recovery > 0 then
      mine.told = mine.held
    elseif mine.target > mine.held then
      local more = math.max(0, math.min(mine.target - mine.held, free))
      mine.held, mine.told, free = mine.held + more, mine.held + more, free - more
    else
      mine.told = mine.target
    end
    mine.contest = 0
    local is_hungry = mine.demand > mine.held
    for other, record in pairs(records) do
      if other ~= id then
        if record.demand > record.held then
          mine.contest = turns and TURNS or WANTED
        end
        if is_hungry and (record.told > record.target or record.contest == 0) then
          wake(wakes, other, number)
        end
      end
    end
    if recovery == 0 then
      offer(wakes, records, free, number, id)
    end
    changes[id] = pack(mine)
    local flat = {}
    for field, value in pairs(changes) do
      flat[#flat + 1] = field
      flat[#flat + 1] = value
    end
    redis.call('HSET', keys[number], unpack(flat))
    redis.call('PEXPIRE', keys[number], FORGET)
    for _, value in ipairs({
      mine.told, mine.target, mine.contest, total, tonumber(others['#version'] or '0'),
      sum_held(records) - mine.held, trial,
    }) do
      answer[#answer + 1] = value
    end
  end
  publish(wakes, keys, arguments[4])
  return answer
end

-- Gives back all slots of limits. keys: as for `report`. Arguments: the member's id, the prefix of the channels, and
-- 1 if the member leaves altogether.
operations.release = function(keys, arguments)
  local at, id = now(), arguments[1]
  local members, recovery = read_members(keys[1], at)
  if arguments[3] == '1' then
    redis.call('HDEL', keys[1], id)
    members[id] = nil
  end
  local wakes = {}
  for number = 2, #keys do
    redis.call('HDEL', keys[number], id)
    local records, others = read_limit(keys[number], members)
    records[id] = nil
    local total = total_of(records, others)
    if total and recovery == 0 then
      set_targets(records, total, at)
      offer(wakes, records, total - sum_held(records), number)
    end
  end
  publish(wakes, keys, arguments[2])
  return 1
end

-- Dispatch ------------------------------------------------------------------------------------------------------------

local operation = operations[ARGV[1]]
if not operation then
  return redis.error_reply('ERR the script has no such operation')
end
local arguments = {}
for index = 2, #ARGV do
  arguments[index - 1] = ARGV[index]
end
return operation(KEYS, arguments)
