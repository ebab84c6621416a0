# A disk in memory, whose byte 8192 cannot be written: so there are errors to compare.
proc config {key value} {
    global disk
    if {$key ne "size"} { error "unknown parameter $key" }
    set disk [binary format x$value]
}
proc config_complete {} {
    global disk
    if {![info exists disk]} { error "size is missing" }
}
proc plugin_open {readonly} { return 1 }
proc plugin_close {h} {}
proc get_size {h} { global disk; return [string length $disk] }
proc can_write {h} { return 1 }
proc can_flush {h} { return 1 }
proc can_trim {h} { return 1 }
proc is_rotational {h} { return 1 }
proc put {offset data} {
    global disk
    set end [expr {$offset + [string length $data]}]
    if {$offset <= 8192 && 8192 < $end} { error "full at 8192" }
    set disk [string range $disk 0 [expr {$offset - 1}]]$data[string range $disk $end end]
}
proc pread {h count offset} {
    global disk
    return [string range $disk $offset [expr {$offset + $count - 1}]]
}
proc pwrite {h buf offset} { put $offset $buf }
proc flush {h} {}
proc trim {h count offset} { put $offset [string repeat \xaa $count] }
proc zero {h count offset may_trim} { put $offset [string repeat \x00 $count] }
