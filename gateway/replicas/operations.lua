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
