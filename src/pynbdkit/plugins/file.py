"""file: serve a file or a block device, or all those in a directory (nbdkit-file-plugin(1)).

Every connection has its own descriptor. Reads and writes are pread and pwrite, never a mapping:
a mapped file that somebody truncates would kill the server. What a reply may promise about stable
storage is decided in `_stable.py`. Making holes and zeros tries what the filesystem may have, best
first, remembers what it refuses, and leaves the rest to the server (which writes zeros).
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque

from .. import fallocate, heap, log, parameters
from ..device import Device
from ..errors import ConfigError
from ..extents import HOLE, ZERO
from ..flags import CacheMode, Flag, Fua
from ..plugin import Plugin
from . import _linux
from ._stable import StableFiles, write_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any, Final

    from ..device import Buffer
    from ..session import Session
    from ._stable import StableFile

READ_ONLY: Final = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY)
"""Errors of opening for writing after which reading may still be possible."""
REFUSED: Final = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)
"""Errors that mean "this filesystem or device cannot do that", now and later."""
EXTENTS_AT_ONCE: Final = 2048
"""A client that wants more asks again from where the answer ended."""
WRITES_BEHIND: Final = 64
"""cache=none: how many writes later the kernel has written one out, most likely."""
LARGEST_FOLIO: Final = 2 << 20
"""What the page cache keeps or drops as one, at most (bytes; aligned to its size)."""

_PUNCH: Final = fallocate.PUNCH_HOLE | fallocate.KEEP_SIZE
_ADVICE: Final = {
    "normal": "POSIX_FADV_NORMAL",
    "random": "POSIX_FADV_RANDOM",
    "sequential": "POSIX_FADV_SEQUENTIAL",
}


class FilePlugin(Plugin):
    """Serve a file, a block device, or the files of a directory."""

    name = "file"
    longname = "nbdkit file plugin"
    description = "Serve a file, a block device, or the files of a directory"
    forkable = True

    file = parameters.path("The file or block device to serve", magic=True, metavar="FILENAME")
    dir = parameters.path("A directory: its files are the exports", metavar="DIRECTORY")
    fd = parameters.integer("An inherited descriptor of a file to serve", metavar="FILE_DESCRIPTOR")
    dirfd = parameters.integer("An inherited descriptor of a directory", metavar="FILE_DESCRIPTOR")
    cache = parameters.enum(
        "Whether the page cache keeps what was read and written",
        ("default", "none"),
        default="default",
    )
    fadvise = parameters.enum("What the kernel is told to expect", tuple(_ADVICE), default="normal")

    def load(self) -> None:
        """Nothing is known of any file yet."""
        self._stable = StableFiles()

    def config(self, key: str, value: str) -> None:
        """Refuse what an old command line may have, and paths that would mean the folder itself."""
        if key in ("rdelay", "wdelay"):
            raise ConfigError(f"{key}: add --filter=delay on the command line")
        if key in ("file", "dir") and not value:
            raise ConfigError(f"{key}: the path is empty")
        super().config(key, value)

    def config_complete(self) -> None:
        """Exactly one thing to serve, and of the right kind."""
        modes = [name for name in ("file", "dir", "fd", "dirfd") if getattr(self, name) is not None]
        if not modes:
            raise ConfigError(
                "you must supply [file=]<FILENAME>, dir=<DIRECTORY>, fd=<FILE_DESCRIPTOR>"
                " or dirfd=<FILE_DESCRIPTOR> after the plugin name on the command line"
            )
        if len(modes) > 1:
            raise ConfigError(f"{modes[0]}= and {modes[1]}= cannot be used at the same time")
        mode = modes[0]
        value = getattr(self, mode)
        if mode in ("file", "dir"):
            value = os.path.abspath(os.fspath(value))  # a program may have set a Path
            setattr(self, mode, value)
            shown = value
        else:
            if value <= 2:
                raise ConfigError(
                    f"{mode}={value}: must be 3 or more (0 to 2 are the standard streams)"
                )
            shown = f"{mode}={value}"
        try:
            info = os.stat(value)
        except OSError as error:
            raise ConfigError(f"{shown}: {error.strerror}") from None
        if mode in ("dir", "dirfd"):
            if not stat.S_ISDIR(info.st_mode):
                raise ConfigError(f"expecting a directory: {shown}")
        elif stat.S_ISDIR(info.st_mode):
            raise ConfigError(
                f"use {'dir' if mode == 'file' else 'dirfd'}= to serve files within {shown}"
            )
        elif not _servable(info):
            raise ConfigError(f"file is not regular or block device: {shown}")
        if mode == "fd":
            self._check_descriptor()

    def _check_descriptor(self) -> None:
        from fcntl import F_GETFL, fcntl

        flags = fcntl(self.fd, F_GETFL)
        if flags & os.O_ACCMODE == os.O_WRONLY:
            raise ConfigError(f"fd={self.fd}: not open for reading")
        for name in ("O_APPEND", "O_DIRECT", "O_PATH"):
            if flags & getattr(os, name, 0):
                raise ConfigError(
                    f"fd={self.fd}: opened with {name}, which would not put data where it belongs"
                )

    def get_ready(self) -> None:
        """Where several processes will serve, what one learns of lost data is for all."""
        if self.worker_count > 1:
            self._stable.share()

    def dump_plugin(self) -> Iterable[tuple[str, str]]:
        """What the peer tells about itself."""
        for what in ("blksszget", "blkzeroout", "falloc_fl_punch_hole", "falloc_fl_zero_range"):
            yield f"file_{what}", "yes"

    # -- exports ---------------------------------------------------------------------------------

    def list_exports(self, readonly: bool, is_tls: bool) -> Iterable[str]:
        """The regular files and block devices of the directory; one export, "", for a file."""
        if self.dir is None and self.dirfd is None:
            return [""]
        folder = self._open_folder()
        try:
            return sorted(name for name in os.listdir(folder) if _is_export(name, folder))
        finally:
            os.close(folder)

    def _open_folder(self) -> int:
        if self.dir is not None:
            return os.open(self.dir, os.O_RDONLY | os.O_DIRECTORY)
        # A description of our own: reading a directory moves its position.
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self.dirfd)

    def open(self, session: Session) -> Device:
        """A device on a descriptor of its own, for reading only where nothing else is possible."""
        if self.fd is not None:
            fd, writable = self._open_descriptor(session.readonly)
        elif self.file is not None:
            fd, writable = _open_file(self.file, None, session.readonly)
        else:
            name = session.export_name
            _check_export_name(name)
            if self.dir is not None:
                fd, writable = _open_file(os.path.join(self.dir, name), None, session.readonly)
            else:
                fd, writable = _open_file(name, self.dirfd, session.readonly)
        try:
            return self._device(fd, writable)
        except BaseException:
            os.close(fd)
            raise

    def _open_descriptor(self, readonly: bool) -> tuple[int, bool]:
        from fcntl import F_GETFL, fcntl

        access = fcntl(self.fd, F_GETFL) & os.O_ACCMODE
        writable = access == os.O_RDWR and not readonly
        try:
            # With a position of its own, which finding holes moves.
            return os.open(
                f"/proc/self/fd/{self.fd}", access if writable else os.O_RDONLY
            ), writable
        except OSError:
            if self.worker_count > 1:  # they would share a position, and the kernel's reports
                raise
            return os.dup(self.fd), writable

    def _device(self, fd: int, writable: bool) -> FileDevice:
        info = os.fstat(fd)
        is_block = stat.S_ISBLK(info.st_mode)
        if writable and is_block and _linux.block_is_read_only(fd):
            log.debug("the block device is read-only")
            writable = False
        if self.fadvise != "normal":
            os.posix_fadvise(fd, 0, 0, getattr(os, _ADVICE[self.fadvise]))
        kind: type[FileDevice]
        if self.cache == "none":
            kind = UncachedBlockDevice if is_block else UncachedFileDevice
        else:
            kind = BlockDevice if is_block else FileDevice
        return kind(self._stable, fd, info, writable)


def _servable(info: os.stat_result) -> bool:
    return stat.S_ISREG(info.st_mode) or stat.S_ISBLK(info.st_mode)


def _is_export(name: str, folder: int) -> bool:
    """Whether a directory's entry is one that a client may ask for."""
    try:
        name.encode()  # the protocol's names are UTF-8
        return _servable(os.stat(name, dir_fd=folder))
    except (OSError, UnicodeEncodeError):
        return False


def _check_export_name(name: str) -> None:
    """Keep a client within the directory. Raises OSError."""
    if not name:
        raise OSError(errno.ENOENT, "directory mode has no default export: ask for a file by name")
    if "/" in name or "\0" in name or name in (".", ".."):
        raise OSError(errno.EINVAL, f"invalid export name {name!r}: not the name of a file here")


def _open_file(name: str, folder: int | None, readonly: bool) -> tuple[int, bool]:
    """Open a regular file or block device; returns the descriptor and whether it can be written.

    Nothing else is ever opened (opening a pipe waits, opening a tape rewinds it), even if names
    change between the look and the opening.
    """
    refusal = OSError(errno.EINVAL, "file is not regular or block device", name)
    info = os.stat(name, dir_fd=folder)
    if not _servable(info):
        raise refusal
    wait = 0 if stat.S_ISBLK(info.st_mode) else os.O_NONBLOCK
    writable = not readonly
    if writable:
        try:
            fd = os.open(name, os.O_RDWR | wait, dir_fd=folder)
        except OSError as error:
            if error.errno not in READ_ONLY:
                raise
            log.debug(f"{name}: cannot be opened for writing ({error.strerror}): read-only")
            writable = False
    if not writable:
        fd = os.open(name, os.O_RDONLY | wait, dir_fd=folder)
    try:
        if not _servable(os.fstat(fd)):
            raise refusal
        os.set_blocking(fd, True)
    except BaseException:
        os.close(fd)
        raise
    return fd, writable


class FileDevice(Device):
    """A regular file, as one connection has it open."""

    def __init__(self, files: StableFiles, fd: int, info: os.stat_result, writable: bool) -> None:
        self._fd = fd
        self._info = info
        self._writable = writable
        self._files = files
        self._size = self._find_size()
        self._stable: StableFile = files.acquire(fd, info, writable)

    def _find_size(self) -> int:
        return self._info.st_size

    def close(self) -> None:
        """Give the descriptors back."""
        self._stable.close(self._fd)
        self._files.release(self._stable, self._info)

    # -- questions -------------------------------------------------------------------------------

    def get_size(self) -> int:
        """The size when the client came; it does not change for this client."""
        return self._size

    def can_write(self) -> bool:
        """Whether the file could be opened for writing."""
        return self._writable

    def can_fua(self) -> int:
        """A write with FUA makes itself stable, without the rest of the file."""
        return Fua.NATIVE

    def can_multi_conn(self) -> bool:
        """All connections share one page cache, and a sync is for the whole of it."""
        return True

    def can_cache(self) -> int:
        """The kernel reads ahead."""
        return CacheMode.NATIVE

    def can_fast_zero(self) -> bool:
        """Where it is not possible, zero says so before it has done anything."""
        return True

    def can_extents(self) -> bool:
        """Whether the filesystem tells where data is."""
        try:
            os.lseek(self._fd, 0, os.SEEK_HOLE)
        except OSError as error:
            return error.errno == errno.ENXIO  # an empty file
        return True

    # -- data ------------------------------------------------------------------------------------

    def pread(self, count: int, offset: int, flags: int) -> Buffer:
        """Read; the end of the file inside the disk (it was truncated) is EIO, never short data."""
        if count >= heap.LARGE:
            heap.keep()
        data = os.pread(self._fd, count, offset)
        if len(data) == count:
            return data
        return self._read_rest(data, count, offset)

    def _read_rest(self, data: bytes, count: int, offset: int) -> Buffer:
        buf = memoryview(bytearray(count))
        have = len(data)
        buf[:have] = data
        while have < count:
            more = os.preadv(self._fd, (buf[have:],), offset + have)
            if more == 0:
                raise OSError(
                    errno.EIO,
                    f"the file ends at {offset + have}, inside the disk of {self._size} bytes:"
                    " it has been truncated",
                )
            have += more
        return buf

    def pwrite(self, buf: Buffer, offset: int, flags: int) -> None:
        """Write; with FUA, until it is stable."""
        if flags & Flag.FUA:
            self._stable.write_through(buf, offset)
        else:
            self._stable.dirty += len(buf)
            write_all(self._fd, buf, offset)

    def pwrite_group(self, writes: Sequence[tuple[Buffer, int]]) -> bool:
        """Write several buffers and sync once, where that is cheaper than a sync for each."""
        if not self._stable.group():
            return False
        for buf, offset in writes:
            write_all(self._fd, buf, offset)
        self._stable.sync()
        return True

    def flush(self, flags: int) -> None:
        """fdatasync; after one that failed, no flush of this file succeeds any more."""
        if self._writable:
            self._stable.sync()
        else:
            self._stable.sync_reader(self._fd)

    def cache(self, count: int, offset: int, flags: int) -> None:
        """Have the kernel read the range in the background."""
        os.posix_fadvise(self._fd, offset, count, os.POSIX_FADV_WILLNEED)

    # -- zeros and holes -------------------------------------------------------------------------

    def trim(self, count: int, offset: int, flags: int) -> None:
        """Make a hole; where that is impossible nothing happens, as trim is only advice."""
        if count:
            self._discard(count, offset)
        if flags & Flag.FUA:
            self._stable.sync()

    def zero(self, count: int, offset: int, flags: int) -> None:
        """Make zeros without writing them. Raises OSError(EOPNOTSUPP) where that is impossible."""
        if count:
            self._make_zeros(count, offset, flags)
        if flags & Flag.FUA:
            self._stable.sync()

    def _discard(self, count: int, offset: int) -> None:
        self._fallocate(_PUNCH, count, offset)

    def _make_zeros(self, count: int, offset: int, flags: int) -> None:
        punched = flags & Flag.MAY_TRIM and self._fallocate(_PUNCH, count, offset)
        # Beyond the end (of a file that was truncated) a hole would not read as zeros.
        if punched and os.fstat(self._fd).st_size >= offset + count:
            return
        if self._fallocate(fallocate.ZERO_RANGE, count, offset):
            return
        if self._fallocate(_PUNCH, count, offset) and self._fallocate(0, count, offset):
            return
        raise OSError(errno.EOPNOTSUPP, "this filesystem cannot make zeros without writing them")

    def _fallocate(self, mode: int, count: int, offset: int) -> bool:
        """fallocate(2); False where the filesystem has no such mode (asked once)."""
        return self._attempt(mode, lambda: fallocate.fallocate(self._fd, mode, offset, count))

    def _attempt(self, what: int, call: Any) -> bool:
        unsupported = self._stable.unsupported
        if what in unsupported:
            return False
        try:
            call()
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            log.debug(f"fallocate mode {what}: {error.strerror}: not tried again for this file")
            unsupported.add(what)
            return False
        return True

    # -- extents ---------------------------------------------------------------------------------

    def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        """What the filesystem says of data and holes; a part that was truncated away is "data".

        (Were it a hole, a copy would have zeros there; as data, reading it fails as it should.)
        """
        fd = self._fd
        end = offset + count
        limit = 1 if flags & Flag.REQ_ONE else EXTENTS_AT_ONCE
        found: list[tuple[int, int, int]] = []
        while offset < end and len(found) < limit:
            try:
                data = min(os.lseek(fd, offset, os.SEEK_DATA), end)
                if data > offset:
                    found.append((offset, data - offset, HOLE | ZERO))
                    offset = data
                    if data == end or len(found) == limit:
                        break
                hole = min(os.lseek(fd, offset, os.SEEK_HOLE), end)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                # No data from here to the end of the file.
                last = min(max(os.fstat(fd).st_size, offset), end)
                if last > offset:
                    found.append((offset, last - offset, HOLE | ZERO))
                if end > last:
                    found.append((last, end - last, 0))
                break
            if hole > offset:  # else somebody has just made a hole here: look again
                found.append((offset, hole - offset, 0))
                offset = hole
        return found


class BlockDevice(FileDevice):
    """A block device, as one connection has it open."""

    def _find_size(self) -> int:
        self._sector = _linux.block_sector_size(self._fd)
        return os.lseek(self._fd, 0, os.SEEK_END)

    def is_rotational(self) -> bool:
        """As the kernel says."""
        return _linux.is_rotational(self._info.st_rdev)

    def can_extents(self) -> bool:
        """A block device does not tell."""
        return False

    def _inside(self, count: int, offset: int) -> tuple[int, int]:
        """The whole sectors in a range, as (offset, count)."""
        first = -(-offset // self._sector) * self._sector
        last = (offset + count) // self._sector * self._sector
        return first, max(last - first, 0)

    def _discard(self, count: int, offset: int) -> None:
        first, length = self._inside(count, offset)
        if length:
            self._attempt(-1, lambda: _linux.block_discard(self._fd, first, length))

    def _make_zeros(self, count: int, offset: int, flags: int) -> None:
        first, length = self._inside(count, offset)
        if not (length and self._zero_sectors(length, first, flags)):
            raise OSError(errno.EOPNOTSUPP, "this device cannot make zeros without writing them")
        write_all(self._fd, bytes(first - offset), offset)
        write_all(self._fd, bytes(offset + count - first - length), first + length)

    def _zero_sectors(self, count: int, offset: int, flags: int) -> bool:
        # Of a block device PUNCH_HOLE promises zeros, and fails rather than write them.
        if flags & Flag.MAY_TRIM and self._fallocate(_PUNCH, count, offset):
            return True
        if flags & Flag.FAST_ZERO:
            return False  # BLKZEROOUT may write
        return self._attempt(-2, lambda: _linux.block_zero(self._fd, offset, count))


class _DropBehind(FileDevice):
    """cache=none: what was read or written does not stay in the page cache for long.

    DONTNEED drops clean pages at once; of dirty ones it only starts the writing. So each range that
    was written is named twice: now, and some writes later.
    """

    def __init__(self, files: StableFiles, fd: int, info: os.stat_result, writable: bool) -> None:
        super().__init__(files, fd, info, writable)
        self._behind: deque[tuple[int, int]] = deque()

    def _drop(self, offset: int, count: int) -> None:
        # The cache is in folios, which are dropped whole or not at all: so begin where the first
        # one may begin. Not so at the end: what comes next may have been read ahead.
        start = offset & -LARGEST_FOLIO
        os.posix_fadvise(self._fd, start, count + offset - start, os.POSIX_FADV_DONTNEED)

    def pread(self, count: int, offset: int, flags: int) -> Buffer:
        """Read, then drop the pages."""
        data = super().pread(count, offset, flags)
        self._drop(offset, count)
        return data

    def pwrite(self, buf: Buffer, offset: int, flags: int) -> None:
        """Write, have the kernel start to write it out, and drop what was written before."""
        super().pwrite(buf, offset, flags)
        count = len(buf)
        self._drop(offset, count)
        if flags & Flag.FUA:
            return  # clean already
        self._behind.append((offset, count))
        if len(self._behind) > WRITES_BEHIND:
            try:
                self._drop(*self._behind.popleft())
            except IndexError:
                pass  # another thread has taken it

    def flush(self, flags: int) -> None:
        """Sync; then everything is clean and may go."""
        super().flush(flags)
        self._behind.clear()
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)


class UncachedFileDevice(_DropBehind):
    """A regular file with cache=none."""


class UncachedBlockDevice(_DropBehind, BlockDevice):
    """A block device with cache=none."""
