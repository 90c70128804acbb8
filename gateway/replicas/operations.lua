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
