-- Recognises requests that run only GraphQL queries. On any doubt, a request is not a query: two servers may read an unusual
-- body differently, and a mutation must never run twice.

local MAX_GRAPHQL_BYTES = 16 * 1024 -- a longer body is no query: 16 KB stop the thread for up to 3 ms on a busy machine
local MAX_DEPTH = 100
local MEMBERS = {query = true, operationName = true, variables = true, extensions = true}
local ESCAPES = {['"'] = '"', ["\\"] = "\\", ["/"] = "/", b = "\b", f = "\f", n = "\n", r = "\r", t = "\t"}
local CLOSING = {["{"] = "}", ["["] = "]", ["("] = ")"}

-- Each skip function returns the position after a part that starts at a position, or nil without such a part.

local function skip_json_string(text, at)
  if text:byte(at) ~= 34 then
    return nil
  end
  at = at + 1
  while true do
    at = text:match('^[^"\\%c]*()', at)
    if text:byte(at) == 34 then
      return at + 1
    end
    at = text:match('^\\["\\/bfnrt]()', at) or text:match("^\\u%x%x%x%x()", at)
    if not at then
      return nil
    end
  end
end

local function skip_json(text, at, depth)
  local first = text:sub(at, at)
  if first == '"' then
    return skip_json_string(text, at)
  elseif first ~= "{" and first ~= "[" then
    return text:match("^-?%d+%.?%d*[eE]?[+-]?%d*()", at)
      or text:match("^true()", at) or text:match("^false()", at) or text:match("^null()", at)
  elseif depth == MAX_DEPTH then
    return nil
  end
  local close, separator = CLOSING[first], nil
  at = text:match("^[ \t\r\n]*()", at + 1)
  if text:sub(at, at) == close then
    return at + 1
  end
  while separator ~= close do
    if first == "{" then
      at = skip_json_string(text, at)
      at = at and text:match("^[ \t\r\n]*:[ \t\r\n]*()", at)
    end
    at = at and skip_json(text, at, depth + 1)
    if not at then
      return nil
    end
    separator, at = text:match("^[ \t\r\n]*([,%]}])[ \t\r\n]*()", at)
    if separator ~= "," and separator ~= close then
      return nil
    end
  end
  return at
end

-- Return the text in a JSON string. Characters above 127 become `?`, which is valid only in strings and comments of GraphQL.
local function unescape(text)
  return (text:gsub("\\(.)(%x?%x?%x?%x?)", function(kind, digits)
    if kind ~= "u" then
      return ESCAPES[kind] .. digits
    end
    local code = tonumber(digits, 16)
    return code < 128 and string.char(code) or "?"
  end))
end

-- Return the GraphQL document of a body, or nil: for batches, for requests by an id, and for members that a server may
-- prefer to the text.
local function read_document(body)
  local at = body:match("^[ \t\r\n]*{()")
  local members, document, separator = {}, nil, at and ","
  while separator == "," do
    local name, start = body:match('^[ \t\r\n]*"(%a+)"[ \t\r\n]*:[ \t\r\n]*()', at)
    if not name or not MEMBERS[name] or members[name] then
      return nil
    end
    members[name] = true
    local stop = skip_json(body, start, 1)
    if not stop then
      return nil
    elseif name == "query" and body:byte(start) == 34 then
      document = unescape(body:sub(start + 1, stop - 2))
    end
    separator, at = body:match("^[ \t\r\n]*([,}])()", stop)
  end
  return separator == "}" and body:find("^[ \t\r\n]*$", at) and document
end

local function skip_ignored(text, at)
  repeat
    local start = text:match("^[ \t\r\n,]*()", at)
    at = text:match("^#[^\r\n]*()", start) or start
  until at == start
  return at
end

local function skip_graphql_string(text, at)
  if text:find('^"""', at) then
    local start = at + 3
    repeat
      start = text:find('"""', start, true)
      if not start then
        return nil
      end
      start = start + 3
    until text:sub(start - 4, start - 4) ~= "\\"
    return start
  end
  at = at + 1
  while true do
    at = text:match('^[^"\\\r\n]*()', at)
    if text:byte(at) == 34 then
      return at + 1
    elseif text:byte(at) ~= 92 then
      return nil
    end
    at = at + 2
  end
end

-- Skip a definition: until its selection set ends.
local function skip_definition(text, at)
  local stack = {}
  while true do
    at = skip_ignored(text, at)
    local first = text:sub(at, at)
    if CLOSING[first] then
      if #stack == MAX_DEPTH then
        return nil
      end
      stack[#stack + 1] = CLOSING[first]
      stack.is_body = stack.is_body or (#stack == 1 and first == "{")
      at = at + 1
    elseif first == "}" or first == "]" or first == ")" then
      if table.remove(stack) ~= first then
        return nil
      end
      at = at + 1
      if #stack == 0 and stack.is_body then
        return at
      end
    elseif first == '"' then
      at = skip_graphql_string(text, at)
    else
      local token = text:match("^[%w_.$:=@!|&+-]+", at)
      at = token and at + #token
      if #stack == 0 and (token == "mutation" or token == "subscription") then
        return nil -- a syntax error, unless the operation has this name
      end
    end
    if not at then
      return nil
    end
  end
end

local function has_only_queries(document)
  local at, has_query = skip_ignored(document, 1), false
  while at <= #document do
    local word = document:match("^[%w_]+", at)
    if word ~= "fragment" then
      if word ~= "query" and document:byte(at) ~= 123 then
        return false
      end
      has_query = true
    end
    at = skip_definition(document, at)
    if not at then
      return false
    end
    at = skip_ignored(document, at)
  end
  return has_query
end

-- Return true if a POST request runs only queries. A server may prefer a query string to the body.
function is_graphql_query(headers, body)
  local content_type = headers["content-type"]
  local parameters = type(content_type) == "string" and content_type:lower():match("^application/json%s*(.*)$")
  if parameters ~= "" and not (parameters and parameters:find('^;%s*charset="?utf%-8"?$')) then
    return false
  end
  if not body or #body > MAX_GRAPHQL_BYTES or headers[":path"]:find("?", 1, true) or headers["content-encoding"] then
    return false
  end
  local document = read_document(body)
  return document and has_only_queries(document) or false
end
