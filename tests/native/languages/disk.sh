#!/bin/sh
# A disk in a file, whose byte 8192 cannot be written: so there are errors to compare.
disk=$tmpdir/disk
check () { # COUNT OFFSET
    if [ "$2" -le 8192 ] && [ 8192 -lt $(($1 + $2)) ]; then
        echo "ENOSPC full at 8192" >&2
        exit 1
    fi
}
case $1 in
    config) [ "$2" = size ] || { echo "unknown parameter $2" >&2; exit 1; }
        truncate -s "$3" "$disk";;
    thread_model) echo serialize_all_requests;;
    list_exports) printf 'NAMES+DESCRIPTIONS\nfirst\nthe first one\nsecond\n\n';;
    default_export) echo first;;
    export_description) echo "what a shell knows";;
    get_size) stat -c %s "$disk";;
    block_size) echo 1 4096 65536;;
    can_write | can_trim | can_zero | can_flush | can_extents | is_rotational) exit 0;;
    can_fast_zero) exit 0;;
    can_multi_conn) exit 3;;
    can_fua) echo native;;
    can_cache) echo emulate;;
    pread) tail -c +$(($4 + 1)) "$disk" | head -c "$3";;
    pwrite) cat >"$tmpdir/new" # all of it, or the server finds nobody who reads
        check "$3" "$4"
        dd if="$tmpdir/new" of="$disk" bs=1M seek="$4" oflag=seek_bytes conv=notrunc status=none;;
    trim | zero) check "$3" "$4"
        case $5 in *fast*) echo "ENOTSUP not that fast" >&2; exit 1;; esac
        head -c "$3" /dev/zero |
            dd of="$disk" bs=1M seek="$4" oflag=seek_bytes conv=notrunc status=none;;
    flush) exit 0;;
    extents) echo "0 4096 hole,zero"; echo "4096 258048";;
    *) exit 2;;
esac
