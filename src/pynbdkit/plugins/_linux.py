"""What Linux can do with block devices that the `os` module has no call for.

Their ioctls, and what sysfs knows of a disk. Every function raises OSError with the errno of the
call; where the system has no such call, with EOPNOTSUPP.
"""

from __future__ import annotations

import os
import struct


def _none(number: int) -> int:
    """_IO(0x12, number): the direction bits of "no argument" differ on a few machines."""
    unusual = os.uname().machine.startswith(("mips", "ppc", "sparc", "alpha"))
    return (0x20000000 if unusual else 0) | 0x1200 | number


def _ioctl_range(fd: int, number: int, offset: int, count: int) -> None:
    from fcntl import ioctl

    ioctl(fd, _none(number), struct.pack("QQ", offset, count))


def _ioctl_int(fd: int, number: int) -> int:
    from fcntl import ioctl

    answer: int = struct.unpack("i", ioctl(fd, _none(number), struct.pack("i", 0)))[0]
    return answer


def block_discard(fd: int, offset: int, count: int) -> None:
    """BLKDISCARD: the block device need not keep these sectors."""
    _ioctl_range(fd, 119, offset, count)


def block_zero(fd: int, offset: int, count: int) -> None:
    """BLKZEROOUT: these sectors read as zeros, and stay allocated; the kernel may have to write."""
    _ioctl_range(fd, 127, offset, count)


def block_sector_size(fd: int) -> int:
    """BLKSSZGET: the unit of discarding and zeroing, in bytes (512 where nobody knows)."""
    try:
        return _ioctl_int(fd, 104) or 512
    except OSError:
        return 512


def block_is_read_only(fd: int) -> bool:
    """BLKROGET: such a device can be opened for writing, and refuses each write."""
    try:
        return bool(_ioctl_int(fd, 94))
    except OSError:
        return False


def is_rotational(device: int) -> bool:
    """Whether the block device with this number (st_rdev) turns; a partition is as its disk."""
    folder = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"
    for place in ("queue", "../queue"):
        try:
            with open(f"{folder}/{place}/rotational", encoding="ascii") as stream:
                return stream.read().strip() == "1"
        except OSError:
            continue
    return False
