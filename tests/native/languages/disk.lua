-- A disk in memory, whose byte 8192 cannot be written: so there are errors to compare.
local disk = nil
function config (key, value)
    if key ~= "size" then error ("unknown parameter " .. key) end
    disk = string.rep ("\0", tonumber (value))
end
function config_complete () if disk == nil then error ("size is missing") end end
function open (readonly) return 1 end
function close (h) end
function get_size (h) return #disk end
function can_write (h) return true end
function can_flush (h) return true end
function can_trim (h) return true end
function is_rotational (h) return true end
local function put (offset, data)
    if offset <= 8192 and 8192 < offset + #data then error ("full at 8192") end
    disk = disk:sub (1, offset) .. data .. disk:sub (offset + #data + 1)
end
function pread (h, count, offset) return disk:sub (offset + 1, offset + count) end
function pwrite (h, buf, offset) put (offset, buf) end
function flush (h) end
function trim (h, count, offset) put (offset, string.rep ("\xaa", count)) end
function zero (h, count, offset, may_trim) put (offset, string.rep ("\0", count)) end
