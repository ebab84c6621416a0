# A disk in memory, whose byte 8192 cannot be written: so there are errors to compare.
$disk = nil
def config(key, value)
  raise "unknown parameter #{key}" if key != "size"
  $disk = "\0".b * value.to_i
end
def config_complete
  raise "size is missing" if $disk.nil?
end
def open(readonly)
  1
end
def close(h)
end
def get_size(h)
  $disk.bytesize
end
def can_write(h)
  true
end
def can_flush(h)
  true
end
def can_trim(h)
  true
end
def is_rotational(h)
  true
end
def check(count, offset)
  return unless offset <= 8192 && 8192 < offset + count
  Nbdkit.set_error(Errno::ENOSPC)
  raise "full at 8192"
end
def pread(h, count, offset)
  $disk.byteslice(offset, count)
end
def pwrite(h, buf, offset)
  check(buf.bytesize, offset)
  $disk[offset, buf.bytesize] = buf.b
end
def flush(h)
end
def trim(h, count, offset)
  check(count, offset)
  $disk[offset, count] = "\xaa".b * count
end
def zero(h, count, offset, may_trim)
  check(count, offset)
  $disk[offset, count] = "\0".b * count
end
