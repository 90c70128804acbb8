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
