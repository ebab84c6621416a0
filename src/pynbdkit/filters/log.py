"""log: write every request to a file, or hand it to a script (nbdkit-log-filter(1)).

An entry is an action with fields, ``key=value`` quoted as the shell does. What takes time has two:
one with its arguments when it starts (ENTER) and one with its result when it ends (LEAVE), joined
by `id`; all else has one (PRINT). The file gets an entry as a line, in one write, under a lock:
lines are whole, and their times never run backwards. The script gets it as shell variables, one
entry after another, from a thread of its own: requests wait only when it lags far behind.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from itertools import count as counter

from .. import log, parameters
from ..errors import ConfigError, nbd_errno
from ..extents import HOLE, ZERO
from ..filter import Filter, FilterDevice
from ..flags import Flag

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from queue import Queue
    from typing import Any, Final

    from ..complete import Layer
    from ..device import Buffer, Device
    from ..extents import Extent
    from ..session import Session

QUEUE: Final = 1000
"""Entries that may wait for the script before requests wait as well."""
_PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_./,:=")
_EXTENT_TYPES = {0: "", HOLE: "hole", ZERO: "zero", HOLE | ZERO: "hole,zero"}


def quote(text: str) -> str:
    """A text as one word of bash, on one line: bare, "quoted", or $'…' where it has to escape.

    Names come from clients: nothing in them may end the line, or the quotes.
    """
    if text and _PLAIN.issuperset(text):
        return text
    if text.isprintable():
        for special in '\\"$`':
            text = text.replace(special, "\\" + special)
        return f'"{text}"'
    escaped = []
    for character in text:
        if character in "\\'":
            escaped.append("\\" + character)
        elif character.isprintable():
            escaped.append(character)
        else:
            escaped += (f"\\{byte:03o}" for byte in _encode(character))
    return f"$'{''.join(escaped)}'"


def _encode(character: str) -> bytes:
    """UTF-8; a stray byte as itself, as the file system's names have them."""
    stray = "\udc80" <= character <= "\udcff"
    return character.encode("utf-8", "surrogateescape" if stray else "surrogatepass")


class LogFilter(Filter):
    """Log all transactions to a file or script."""

    longname = "log filter"

    logfile = parameters.path("The file that the log goes to", metavar="FILE")
    logappend = parameters.boolean("Append to the file, do not truncate it", default=False)
    logscript = parameters.text("A shell script that is run for each entry", metavar="SCRIPT")
    logtimings = parameters.boolean("Add how long each call took (seconds=)", default=False)

    def __init__(self, **values: object) -> None:
        super().__init__(**values)
        self._file = -1
        self._lock = threading.Lock()
        self._second = -1
        self._second_text = ""
        self._failed = False
        self._pid = 0
        self._queue: Queue[str | None] | None = None
        self._worker: threading.Thread | None = None
        self._lists = counter(1)
        self._preconnects = counter(1)
        self._connections = counter(1)

    # -- life ------------------------------------------------------------------------------------

    def config_complete(self) -> None:
        """A script may make requests wait."""
        if self.logscript:
            self.blocking = None

    def get_ready(self) -> None:
        """Open the file, before the server goes to the background. Raises ConfigError."""
        if self.logfile:
            self._file = _open(self.logfile, self.logappend)
        self._pid = os.getpid()
        self.entry("Ready", "PRINT", f"thread_model={self.chain_thread_model}")

    def after_fork(self) -> None:
        """Start the script's thread; log the fork, if there was one."""
        if self.logscript:
            from queue import Queue

            self._queue = Queue(QUEUE)
            self._worker = threading.Thread(target=self._run_scripts, name="log", daemon=True)
            self._worker.start()
        if os.getpid() != self._pid:
            self.entry("Fork", "PRINT", "")

    def cleanup(self) -> None:
        """Wait until the script has had every entry."""
        if self._queue is not None and self._worker is not None:
            self._queue.put(None)
            self._worker.join()
            self._queue = None

    def unload(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    # -- entries ---------------------------------------------------------------------------------

    def entry(self, act: str, kind: str, fields: str, id: int = 0, connection: int = 0) -> None:
        """Log one entry. `kind`: ENTER, LEAVE or PRINT; 0: without id or connection."""
        if self._file >= 0:
            words = [f"connection={connection}"] if connection else []
            words.append(f"...{act}" if kind == "LEAVE" else act)
            if id:
                words.append(f"id={id}")
            if fields:
                words.append(fields)
            if kind == "ENTER":
                words.append("...")
            self._write(" ".join(words))
        if self.logscript:
            lines = [f"act={act}"]
            if connection:
                lines.append(f"connection={connection}")
            lines.append(f"type={kind}")
            if id:
                lines.append(f"id={id}")
            lines += (fields, self.logscript)
            script = "\n".join(lines)
            if self._queue is None:
                _run_script(script)
            else:
                self._queue.put(script)

    def call(
        self,
        act: str,
        operation: Callable[..., Any],
        *arguments: Any,
        fields: str = "",
        id: int = 0,
        connection: int = 0,
        result: Callable[[Any], str] | None = None,
    ) -> Any:
        """Do what `operation` does, between two entries; `result` says what it returned."""
        self.entry(act, "ENTER", fields, id, connection)
        start = time.perf_counter() if self.logtimings else 0.0
        try:
            value = operation(*arguments)
        except Exception as failure:
            number = failure.errno if isinstance(failure, OSError) else errno.EIO
            name = errno.errorcode[nbd_errno(number)]
            self.entry(act, "LEAVE", f"return=-1 error={name}{self._took(start)}", id, connection)
            raise
        words = result(value) + " " if result is not None else ""
        self.entry(act, "LEAVE", f"{words}return=0{self._took(start)}", id, connection)
        return value

    def _took(self, start: float) -> str:
        return f" seconds={time.perf_counter() - start:.6f}" if self.logtimings else ""

    def _write(self, text: str) -> None:
        with self._lock:
            second, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
            if second != self._second:
                self._second = second
                self._second_text = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
            line = f"{self._second_text}.{nanoseconds // 1000:06d} {text}\n"
            rest = memoryview(line.encode("utf-8", "backslashreplace"))
            try:
                while rest:
                    rest = rest[os.write(self._file, rest) :]
            except OSError as failure:
                if not self._failed:  # a full disk must not stop the service, nor fill stderr
                    self._failed = True
                    log.error(f"logfile {self.logfile}: {failure.strerror}; entries are lost")

    def _run_scripts(self) -> None:
        assert self._queue is not None
        queue = self._queue
        while (script := queue.get()) is not None:
            _run_script(script)

    # -- what is logged ----------------------------------------------------------------------------

    def around_preconnect(self, next: Callable[[], None], readonly: bool) -> None:
        """Log what the next layers say to a client."""
        fields = f"readonly={readonly:d}"
        self.call("Preconnect", next, fields=fields, id=_next(self._preconnects))

    def list_exports(
        self, next: Callable[[], Iterable[str | tuple[str, str]]], readonly: bool, is_tls: bool
    ) -> Iterable[str | tuple[str, str]]:
        """Log the names that the next layers list."""

        def names(exports: list[str | tuple[str, str]]) -> str:
            words = (quote(one if isinstance(one, str) else one[0]) for one in exports)
            return f"exports=({' '.join(words)})"

        answer: list[str | tuple[str, str]] = self.call(
            "ListExports",
            lambda: list(next()),
            fields=f"readonly={readonly:d} tls={is_tls:d}",
            id=_next(self._lists),
            result=names,
        )
        return answer

    def open(self, next: Callable[[Session], Layer], session: Session) -> Device:
        """Log what this connection is about."""
        if not (self.logfile or self.logscript):
            return FilterDevice(next(session))
        connection = _next(self._connections)
        below = next(session)
        minimum, preferred, maximum = below.block_size()
        self.entry(
            "Connect",
            "PRINT",
            f"export={quote(session.export_name)} tls={session.is_tls:d} size={below.get_size():#x}"
            f" minsize={minimum:#x} prefsize={preferred:#x} maxsize={maximum:#x}"
            f" write={below.can_write():d} flush={below.can_flush():d}"
            f" rotational={below.is_rotational():d} trim={below.can_trim():d}"
            f" zero={below.can_zero()} fua={below.can_fua()} extents={below.can_extents():d}"
            f" cache={below.can_cache()} fast_zero={below.can_fast_zero():d}",
            connection=connection,
        )
        return _LogDevice(below, self, connection)


class _LogDevice(FilterDevice):
    """The next layer, with every request logged."""

    def __init__(self, next: Layer, owner: LogFilter, connection: int) -> None:
        super().__init__(next)
        self._owner = owner
        self._connection = connection
        self._ids = counter(1)

    def _call(self, act: str, fields: str, operation: Callable[..., Any], *arguments: Any) -> Any:
        return self._owner.call(
            act,
            operation,
            *arguments,
            fields=fields,
            id=_next(self._ids),
            connection=self._connection,
            result=_extents if act == "Extents" else None,
        )

    def pread(self, count: int, offset: int, flags: int) -> Buffer:
        fields = f"offset={offset:#x} count={count:#x}"
        return self._call("Read", fields, self.next.pread, count, offset, flags)

    def pwrite(self, buf: Buffer, offset: int, flags: int) -> None:
        fields = f"offset={offset:#x} count={len(buf):#x} fua={_bit(flags, Flag.FUA)}"
        self._call("Write", fields, self.next.pwrite, buf, offset, flags)

    def flush(self, flags: int) -> None:
        self._call("Flush", "", self.next.flush, flags)

    def trim(self, count: int, offset: int, flags: int) -> None:
        fields = f"offset={offset:#x} count={count:#x} fua={_bit(flags, Flag.FUA)}"
        self._call("Trim", fields, self.next.trim, count, offset, flags)

    def zero(self, count: int, offset: int, flags: int) -> None:
        fields = (
            f"offset={offset:#x} count={count:#x} trim={_bit(flags, Flag.MAY_TRIM)}"
            f" fua={_bit(flags, Flag.FUA)} fast={_bit(flags, Flag.FAST_ZERO)}"
        )
        self._call("Zero", fields, self.next.zero, count, offset, flags)

    def cache(self, count: int, offset: int, flags: int) -> None:
        fields = f"offset={offset:#x} count={count:#x}"
        self._call("Cache", fields, self.next.cache, count, offset, flags)

    def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        fields = f"offset={offset:#x} count={count:#x} req_one={_bit(flags, Flag.REQ_ONE)}"
        answer: list[Extent] = self._call(
            "Extents", fields, self.next.extents, count, offset, flags
        )
        return answer

    def block_status(
        self, context: str, count: int, offset: int, flags: int
    ) -> Iterable[tuple[int, int, int]]:
        fields = f"context={context} offset={offset:#x} count={count:#x}"
        fields += f" req_one={_bit(flags, Flag.REQ_ONE)}"
        answer: list[Extent] = self._call(
            "BlockStatus", fields, self.next.block_status, context, count, offset, flags
        )
        return answer

    def close(self) -> None:
        """Log how many requests there were."""
        fields = f"transactions={_next(self._ids) - 1}"
        self._owner.entry("Disconnect", "PRINT", fields, connection=self._connection)


def _next(numbers: counter[int]) -> int:
    return next(numbers)


def _bit(flags: int, flag: int) -> int:
    return 1 if flags & flag else 0


def _extents(extents: list[Extent]) -> str:
    words = (f'{start:#x} {length:#x} "{_EXTENT_TYPES[kind]}"' for start, length, kind in extents)
    return f"extents=({' '.join(words)})"


def _open(path: str, append: bool) -> int:
    """Open the log; the standard streams as they are, for they may be files with other content."""
    try:
        for number, name in ((1, "/dev/stdout"), (2, "/dev/stderr")):
            if path in (name, f"/dev/fd/{number}"):
                return os.dup(number)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY
        return os.open(path, flags if append else flags | os.O_TRUNC, 0o666)
    except OSError as failure:
        raise ConfigError(f"cannot open logfile {path}: {failure.strerror}") from None


def _run_script(script: str) -> None:
    import subprocess

    shell = "/bin/bash"
    if not os.path.exists(shell):
        # A plain shell has no lists: there, a list is one text.
        import re
        import shlex

        shell = "/bin/sh"
        script = re.sub(
            r"^(exports|extents)=\((.*)\)",
            lambda match: f"{match[1]}={shlex.quote(match[2])}",
            script,
            count=1,
            flags=re.MULTILINE,
        )
    try:
        subprocess.run([shell, "-c", script], stdin=subprocess.DEVNULL, check=False)
    except OSError as failure:
        log.error(f"logscript: {shell}: {failure.strerror}")
