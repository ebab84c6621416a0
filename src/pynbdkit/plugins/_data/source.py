"""Where data comes from outside the text: `<FILE` and `<(SCRIPT)`.

Both are read once, as far as they are needed, and kept; their zeros are not. What can be kept is
bounded: a source that never ends (`</dev/urandom`) is stopped by an error that says how to cut it.
"""

from __future__ import annotations

import errno
import os
import stat

from .image import Builder, Image, from_bytes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

_CHUNK: Final = 1 << 20
_ENDLESS: Final = 1 << 30  # a source without an end of its own, that nothing cuts, is read so far


def load_file(name: str, limit: int | None, room: int) -> Image:
    """The file's content: all of it, or the first `limit` bytes.

    Holes of a sparse file are skipped. Raises OSError, and ValueError where more than `room` bytes
    of data would have to be kept or where no end is seen.
    """
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        mode = os.fstat(fd)
        sized = stat.S_ISREG(mode.st_mode) and mode.st_size > 0
        endless = not sized and not stat.S_ISBLK(mode.st_mode)
        return _read(fd, limit, room, endless, _skip_hole if sized else None)
    finally:
        os.close(fd)


def load_script(script: str, limit: int | None, room: int) -> Image:
    """What /bin/sh prints for the script: all of it, or the first `limit` bytes.

    The script's stdin is empty, its stderr ours. A script that has printed `limit` bytes is killed;
    raises ValueError where one that came to its own end failed.
    """
    import signal
    import subprocess

    process = subprocess.Popen(  # the user's own command line
        ["/bin/sh", "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        process_group=0,  # so that nothing that it started outlives the limit
    )
    assert process.stdout is not None
    try:
        image = _read(process.stdout.fileno(), limit, room, True, None)
        if limit is None or image.size < limit:
            status = process.wait()
            if status < 0:
                raise ValueError(f"the script was killed by signal {-status}")
            if status:
                raise ValueError(f"the script failed with exit status {status}")
        return image
    finally:
        process.stdout.close()
        if process.poll() is None:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()


def room_for_sources() -> int:
    """How many bytes all sources of one disk may fill: half of the machine's memory."""
    return max(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2, _ENDLESS)


def _skip_hole(fd: int, position: int) -> int:
    """Where the next data of a sparse file begins."""
    try:
        return os.lseek(fd, position, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            return position  # a filesystem that cannot say
        return max(os.lseek(fd, 0, os.SEEK_END), position)  # no data any more


def _read(
    fd: int,
    limit: int | None,
    room: int,
    endless: bool,
    skip: Callable[[int, int], int] | None,
) -> Image:
    builder = Builder()
    kept = 0
    while limit is None or builder.offset < limit:
        if skip is not None:
            position = skip(fd, builder.offset)
            if limit is not None:
                position = min(position, limit)
            builder.move(position)
        chunk = _fill(fd, _CHUNK if limit is None else min(_CHUNK, limit - builder.offset))
        if not chunk:
            break
        image = from_bytes(chunk)
        kept += sum(end - start for start, end in image.data(0, image.size))
        builder.put(image)
        if kept > room:
            raise ValueError(
                f"more than {room} bytes of data, half of the memory; cut it with [:LENGTH]"
            )
        if endless and limit is None and builder.offset > _ENDLESS:
            raise ValueError("no end after 1 GiB; cut it with [:LENGTH]")
    return builder.finish()


def _fill(fd: int, count: int) -> bytes:
    """Up to `count` bytes, fewer at the end alone (a pipe gives less at a time)."""
    parts: list[bytes] = []
    while count:
        part = os.read(fd, count)
        if not part:
            break
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
