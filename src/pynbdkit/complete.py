"""Layer: a Device with every gap filled. The one place where the contract's rules live.

A Device says only what it has. `Layer` asks it, once and when first needed, what it can do, and
binds each operation at open: straight to the method that does it where nothing has to be added, to
the next layer where a filter leaves it alone, or to a closure that applies the contract's rule
(plugin-contract.md, "FUA", "The other capabilities"):

- FUA natively, by flush afterwards, or not offered; never on hope: `OpenError` at open;
- zero by write in bounded pieces where there is no zero or it raises EOPNOTSUPP;
- cache by read, extents by "all allocated".

Filters see the Layer below them as `next`; the server sees the outermost one. `asynchronous.py` has
the Layer of a device whose operations are coroutines.
"""

from __future__ import annotations

import errno
from operator import index

from .device import Device, is_awaitable
from .errors import OpenError
from .extents import Extent, normalise
from .flags import CacheMode, Flag, Fua, ZeroMode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Final

    from .device import Buffer
    from .session import Session

    _Write = Callable[[Buffer, int, int], None]
    _Range = Callable[[int, int, int], None]

ZERO_PIECE: Final = 1 << 20
"""How many bytes of zeros one pwrite carries when zero is emulated."""
MAX_SIZE: Final = (1 << 63) - 1
MAX_STATUS: Final = (1 << 64) - 1
"""What a context of a device may say of an extent: 64 bits."""
MAX_EXTENTS: Final = 1 << 16
"""An answer with more extents is cut off (a server may answer for less than was asked)."""

_zeros: list[memoryview] = []


def zero_bytes(count: int) -> memoryview:
    """Zeros, at most ZERO_PIECE of them."""
    if not _zeros:
        _zeros.append(memoryview(bytes(ZERO_PIECE)))
    return _zeros[0][:count]


def write_zeros(
    pwrite: _Write,
    flush: Callable[[int], None] | None,
    count: int,
    offset: int,
    fua: int,
    each_piece: bool,
    session: Session | None = None,
) -> None:
    """Zero a range with pwrite, in pieces of at most ZERO_PIECE bytes.

    Where `fua` (Flag.FUA or 0) is set, each piece carries it (`each_piece`: FUA is native), or
    one flush at the end keeps it (FUA is emulated). Raises what `pwrite` and `flush` raise, and
    OSError(ESHUTDOWN) in the middle of a long range when the `session` is over.
    """
    each = fua if each_piece else 0
    while count > 0:
        piece = min(count, ZERO_PIECE)
        pwrite(zero_bytes(piece), offset, each)
        offset += piece
        count -= piece
        if count and session is not None:
            session.check()
    if fua and not each and flush is not None:
        flush(0)


def exactly(data: Buffer, count: int) -> Buffer:
    """What a pread returned as a contiguous buffer of exactly `count` bytes.

    Raises OSError(EIO) where it has fewer or is not a buffer: the plugin's bug.
    """
    try:
        view = memoryview(data)
        if view.ndim != 1 or view.itemsize != 1:
            view = view.cast("B")
        if not view.contiguous:
            view = memoryview(view.tobytes())
    except TypeError:
        raise OSError(
            errno.EIO, f"pread returned {type(data).__name__} instead of {count} bytes"
        ) from None
    if len(view) < count:
        raise OSError(errno.EIO, f"pread returned {len(view)} bytes instead of {count}")
    return view[:count]


def is_context_name(name: object) -> bool:
    """Whether a text can be a metadata context's name: ``namespace:leaf``, up to 4096 bytes."""
    if not isinstance(name, str) or "\0" in name:
        return False
    namespace, _, leaf = name.partition(":")
    return bool(namespace and leaf) and len(name.encode(errors="replace")) <= 4096


def check_block_size(answer: object, where: str) -> tuple[int, int, int]:
    """A plugin's block sizes, checked (nbdkit-plugin(3), ".block_size"). Raises OpenError."""
    try:
        minimum, preferred, maximum = map(index, answer)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        raise OpenError(
            f"{where}: block_size returned {answer!r}, not (minimum, preferred, maximum)"
        ) from None
    if minimum == preferred == maximum == 0:
        return 0, 0, 0
    if maximum == -1:
        maximum = 0xFFFFFFFF
    rules = (
        (1 <= minimum <= 65536 and minimum & (minimum - 1) == 0,
         "minimum must be a power of 2 between 1 and 65536"),
        (512 <= preferred <= 32 << 20 and preferred & (preferred - 1) == 0,
         "preferred must be a power of 2 between 512 and 32M"),
        (minimum <= preferred <= maximum <= 0xFFFFFFFF,
         "minimum <= preferred <= maximum <= 4G - 1"),
        (maximum == 0xFFFFFFFF or maximum % (minimum or 1) == 0,
         "maximum must be a multiple of minimum"),
    )  # fmt: skip
    for holds, rule in rules:
        if not holds:
            raise OpenError(f"{where}: block_size ({minimum}, {preferred}, {maximum}): {rule}")
    return minimum, preferred, maximum


class Layer:
    """One open layer: every question is answered (once), every operation is there.

    Operations (attributes, so that each costs one call): ``pread(count, offset, flags)``,
    ``pwrite(buf, offset, flags)``, ``flush(flags)``, ``trim``, ``zero``, ``cache`` and
    ``extents(count, offset, flags)``, which returns a list of `Extent`. They raise OSError. The
    caller keeps within the size, and passes only flags that the questions allow.
    ``block_status(context, count, offset, flags)`` is for the names that `contexts` returns.
    """

    pread: Callable[[int, int, int], Buffer]
    unchecked_pread: Callable[[int, int, int], Buffer]
    """pread without the check of what came back, for the server, which checks by itself."""
    pwrite: Callable[[Buffer, int, int], None]
    flush: Callable[[int], None]
    trim: Callable[[int, int, int], None]
    zero: Callable[[int, int, int], None]
    cache: Callable[[int, int, int], None]
    extents: Callable[[int, int, int], list[Extent]]
    block_status: Callable[[str, int, int, int], list[Extent]]

    def __init__(
        self,
        device: Device,
        session: Session,
        where: str,
        next: Layer | None = None,
        wait: Callable[[Any], Any] | None = None,
    ) -> None:
        """`device` is a plugin's (`next` None) or a filter's; `where` names it in errors.

        `wait` runs what the device's questions and its `close` return to await (`EventLoop.wait`).
        """
        self.device = device
        self.session = session
        self.where = where
        self.next = next
        self._wait = wait
        self._answers: dict[str, Any] = {}

    # -- what the device has ---------------------------------------------------------------------

    def own(self, name: str) -> Callable[..., Any] | None:
        """The device's own method of this name; None where it does not override it."""
        method = getattr(self.device, name, None)
        if method is None:
            return None
        if getattr(method, "__func__", method) is getattr(Device, name, None):
            return None
        return method  # type: ignore[no-any-return]

    def _ask(self, name: str, rule: Callable[[], Any], check: Callable[[Any], Any] = bool) -> Any:
        """The answer to a capability question: the device's, the next layer's, or the rule's."""
        try:
            return self._answers[name]
        except KeyError:
            pass
        question = self.own(name)
        if question is not None:
            answer = check(self._settled(question()))
        elif self.next is not None:
            answer = getattr(self.next, name)()
        else:
            answer = rule()
        self._answers[name] = answer
        return answer

    def _settled(self, answer: Any) -> Any:
        """What a question of the device's came to, which may be `async def`."""
        if self._wait is not None and is_awaitable(answer):
            return self._wait(answer)
        return answer

    def _has(self, *names: str) -> Callable[[], bool]:
        return lambda: any(self.own(name) is not None for name in names)

    # -- questions -------------------------------------------------------------------------------

    def get_size(self) -> int:
        """Size in bytes."""

        def check(answer: Any) -> int:
            if isinstance(answer, bool) or not isinstance(answer, int):
                raise OpenError(
                    f"{self.where}: get_size returned {answer!r}, not a number of bytes"
                )
            if not 0 <= answer <= MAX_SIZE:
                raise OpenError(f"{self.where}: get_size returned {answer}, not 0 to 2**63 - 1")
            return answer

        def missing() -> int:
            raise OpenError(f"{self.where}: no get_size")

        return self._ask("get_size", missing, check)  # type: ignore[no-any-return]

    def block_size(self) -> tuple[int, int, int]:
        """(minimum, preferred, maximum) in bytes; zeros: no constraint."""

        def check(answer: Any) -> tuple[int, int, int]:
            return check_block_size(answer, self.where)

        return self._ask("block_size", lambda: (0, 0, 0), check)  # type: ignore[no-any-return]

    def export_description(self) -> str | None:
        """A text about this export, None where there is none."""

        def check(answer: Any) -> str | None:
            if answer is not None and not isinstance(answer, str):
                raise OpenError(f"{self.where}: export_description returned {answer!r}, not a text")
            return answer

        return self._ask("export_description", lambda: None, check)  # type: ignore[no-any-return]

    def can_write(self) -> bool:
        """Whether writes are accepted: never for a read-only session."""
        if self.session.readonly:
            return False
        return self._ask("can_write", self._has("pwrite", "pwrite_fua"))  # type: ignore[no-any-return]

    def can_flush(self) -> bool:
        """Whether a client may flush."""
        return self._ask("can_flush", self._has("flush"))  # type: ignore[no-any-return]

    def can_trim(self) -> bool:
        """Whether a client may trim."""
        return self.can_write() and self._ask("can_trim", self._has("trim", "trim_fua"))

    def can_zero(self) -> int:
        """ZeroMode: NONE only where a filter says so; EMULATE: zeros are written by pwrite."""
        if not self.can_write():
            return ZeroMode.NONE

        def check(answer: Any) -> int:
            if isinstance(self.next, Layer) and not isinstance(answer, bool):
                if answer not in (ZeroMode.NONE, ZeroMode.EMULATE, ZeroMode.NATIVE):
                    raise OpenError(f"{self.where}: can_zero returned {answer!r}, not a ZeroMode")
                return int(answer)
            native = bool(answer) and self.own("zero_fua" if self.own("zero_fua") else "zero")
            return ZeroMode.NATIVE if native or (answer and self.next) else ZeroMode.EMULATE

        def rule() -> int:
            return ZeroMode.NATIVE if self._has("zero", "zero_fua")() else ZeroMode.EMULATE

        return self._ask("can_zero", rule, check)  # type: ignore[no-any-return]

    def can_fast_zero(self) -> bool:
        """Whether FAST_ZERO may be asked for: only where zero is the device's own and says so."""
        if self.can_zero() != ZeroMode.NATIVE:
            return False
        return self._ask("can_fast_zero", lambda: False)  # type: ignore[no-any-return]

    def can_extents(self) -> bool:
        """Whether extents tells more than "all allocated"."""
        return self._ask("can_extents", self._has("extents"))  # type: ignore[no-any-return]

    def contexts(self) -> tuple[str, ...]:
        """Metadata contexts beside ``base:allocation``, to be asked by `block_status`.

        A filter that moves the disk's content about (it has an `extents` or a `get_size`) hides
        those below it, unless it has a `block_status` to move them likewise.
        """

        def check(answer: Any) -> tuple[str, ...]:
            names = tuple(answer) if not isinstance(answer, (str, bytes)) else (answer,)
            for name in names:
                if not is_context_name(name) or name.startswith("base:"):
                    raise OpenError(
                        f"{self.where}: contexts returned {name!r}, not namespace:leaf with a"
                        " namespace of its own"
                    )
            return tuple(dict.fromkeys(names))

        if self.own("contexts") is None and self.next is not None:
            moves = self.own("extents") is not None or self.own("get_size") is not None
            if moves and self.own("block_status") is None:
                return ()
        return self._ask("contexts", tuple, check)  # type: ignore[no-any-return]

    def can_multi_conn(self) -> bool:
        """Whether a flush here covers the writes of other connections."""
        return self._ask("can_multi_conn", lambda: False)  # type: ignore[no-any-return]

    def is_rotational(self) -> bool:
        """Whether the disk turns."""
        return self._ask("is_rotational", lambda: False)  # type: ignore[no-any-return]

    def can_cache(self) -> int:
        """CacheMode."""

        def check(answer: Any) -> int:
            if answer not in (CacheMode.NONE, CacheMode.EMULATE, CacheMode.NATIVE):
                raise OpenError(f"{self.where}: can_cache returned {answer!r} (0, 1 or 2)")
            return int(answer)

        def rule() -> int:
            return CacheMode.NATIVE if self.own("cache") else CacheMode.NONE

        return self._ask("can_cache", rule, check)  # type: ignore[no-any-return]

    def can_fua(self) -> int:
        """Fua: NONE, or how a write keeps it. A write with FUA is right under both others."""
        if not self.can_write():
            return Fua.NONE
        self._bind_writes()
        return self._answers["can_fua"]  # type: ignore[no-any-return]

    @property
    def asynchronous(self) -> bool:
        """Whether there are coroutines at the bottom (`asynchronous.coroutines` has them)."""
        return self.next is not None and self.next.asynchronous

    def may_block(self) -> bool | None:
        """Whether calls may wait, of this layer and those below: the worst of them."""
        below = self.next.may_block() if self.next is not None else False
        own = self.device.blocking
        if own or below:
            return True
        if own is None or below is None:
            return None
        return False

    def pwrite_group(self) -> Callable[[Sequence[tuple[Buffer, int]]], bool] | None:
        """The device's own way to write several buffers with FUA; None where there is none.

        A filter hides it unless it leaves pwrite and FUA alone, or has a way of its own.
        """
        if self.can_fua() == Fua.NONE:
            return None
        own = self.own("pwrite_group")
        if self.next is not None:
            if own is not None or self.own("pwrite") or self.own("can_fua"):
                return own
            return self.next.pwrite_group()
        return own if self.can_fua() == Fua.NATIVE and not self.own("pwrite_fua") else None

    def close(self) -> None:
        """Close the device, then the layers below, each once, whatever one of them raises."""
        try:
            close = self.own("close")
            if close is not None:
                self._settled(close())
        finally:
            if self.next is not None:
                self.next.close()

    # -- operations, bound when first asked for --------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name in ("pread", "unchecked_pread"):
            self._bind_reads()
        elif name in ("pwrite", "trim", "zero"):
            self._bind_writes()
        elif name == "flush":
            self.flush = self._bind_flush()
        elif name == "cache":
            self.cache = self._bind_cache()
        elif name == "extents":
            self.extents = self._bind_extents()
        elif name == "block_status":
            self.block_status = self._bind_block_status()
        else:
            raise AttributeError(name)
        return self.__dict__[name]

    def _bind_reads(self) -> None:
        pread = self.own("pread")
        if pread is None:
            if self.next is None:
                raise OpenError(f"{self.where}: no pread")
            self.pread = self.next.pread
            self.unchecked_pread = self.next.unchecked_pread
            return

        def checked(count: int, offset: int, flags: int = 0) -> Buffer:
            data = pread(count, offset, flags)
            if type(data) is bytes and len(data) == count:
                return data
            return exactly(data, count)

        self.unchecked_pread = pread
        self.pread = checked

    def _bind_flush(self) -> Callable[[int], None]:
        flush = self.own("flush")
        if flush is not None:
            return flush
        if self.next is not None:
            return self.next.flush

        def refuse(flags: int = 0) -> None:
            raise OSError(errno.EINVAL, "this device cannot flush")

        return refuse

    def _bind_cache(self) -> Callable[[int, int, int], None]:
        own = self.own("cache")
        mode = self.can_cache()
        if mode == CacheMode.NATIVE and own is not None:
            return own
        if mode == CacheMode.NATIVE and self.next is not None:
            return self.next.cache
        if (
            own is None
            and self.next is not None
            and not (self.own("can_cache") or self.own("pread"))
        ):
            return self.next.cache
        pread = self.pread

        def cache(count: int, offset: int, flags: int = 0) -> None:
            if mode == CacheMode.EMULATE:
                while count > 0:
                    piece = min(count, ZERO_PIECE)
                    pread(piece, offset, 0)
                    offset += piece
                    count -= piece
                    if count:
                        self.session.check()

        return cache

    def _bind_extents(self) -> Callable[[int, int, int], list[Extent]]:
        own = self.own("extents")
        if own is None and self.next is not None and self.own("can_extents") is None:
            return self.next.extents
        if not self.can_extents() or (own is None and self.next is None):
            return lambda count, offset, flags=0: [Extent(offset, count, 0)]  # type: ignore[misc]
        if own is None:
            assert self.next is not None
            return self.next.extents

        def extents(count: int, offset: int, flags: int = 0) -> list[Extent]:
            answer = own(count, offset, flags)
            try:
                return normalise(answer, count, offset, 1 if flags & Flag.REQ_ONE else MAX_EXTENTS)
            except (ValueError, TypeError) as error:
                raise OSError(errno.EIO, f"extents: {error}") from None

        return extents

    def _bind_block_status(self) -> Callable[[str, int, int, int], list[Extent]]:
        own = self.own("block_status")
        if own is None and self.next is not None:
            return self.next.block_status

        def block_status(context: str, count: int, offset: int, flags: int = 0) -> list[Extent]:
            if own is None:
                raise OSError(errno.EIO, f"{self.where}: contexts, but no block_status")
            answer = own(context, count, offset, flags)
            limit = 1 if flags & Flag.REQ_ONE else MAX_EXTENTS
            try:
                return normalise(answer, count, offset, limit, MAX_STATUS)
            except (ValueError, TypeError) as error:
                raise OSError(errno.EIO, f"block_status of {context}: {error}") from None

        return block_status

    # -- FUA and zero ----------------------------------------------------------------------------

    def _bind_writes(self) -> None:
        """Bind pwrite, trim and zero, and decide what can_fua answers."""
        if "can_fua" in self._answers:
            return
        if not self.can_write():
            self.pwrite = self.trim = self.zero = read_only
            self._answers["can_fua"] = Fua.NONE
            return
        # Asked even where this layer has its own answer: what is below must be sound at open.
        below = self.next.can_fua() if self.next is not None else Fua.NONE
        if self.next is not None and self.own("can_fua") is None:
            # A flag is handed down as it is: the layer below keeps it, by whatever means.
            binder = self._write_binder(Fua.NATIVE if below else Fua.NONE, carries=True)
            self.pwrite, self.trim, self.zero = binder.bind()
            self._answers["can_fua"] = below
        else:
            binder = self._write_binder(self._fua_answer(), self.device.carries_fua)
            self.pwrite, self.trim, self.zero = binder.bind()
            self._answers["can_fua"] = binder.offered

    def _write_binder(self, mode: Any, carries: bool) -> WriteBinder:
        return WriteBinder(self, mode, carries)

    def _fua_answer(self) -> Any:
        """What the device's own can_fua says (`None`: it has none), checked."""
        question = self.own("can_fua")
        if question is None:
            return None
        answer = self._settled(question())
        if isinstance(answer, bool):
            return answer
        if answer not in (Fua.NONE, Fua.EMULATE, Fua.NATIVE) or not isinstance(answer, int):
            raise OpenError(
                f"{self.where}: can_fua returned {answer!r},"
                " not 0 (NONE), 1 (EMULATE) or 2 (NATIVE)"
            )
        return int(answer)


def read_only(*_: object) -> None:
    """What pwrite, trim and zero are where nothing may be written."""
    raise OSError(errno.EROFS, "this export is read-only")


class WriteBinder:
    """The contract's FUA table for one layer: which mode each operation has, and its closure."""

    def __init__(self, layer: Layer, mode: Any, carries: bool) -> None:
        """`mode`: what can_fua said (None: missing; True, False: the draft's boolean)."""
        self.layer = layer
        own = layer.own
        below = layer.next
        self.pwrite_fua = own("pwrite_fua")
        self.trim_fua = own("trim_fua")
        self.zero_fua = own("zero_fua")
        self.pwrite: _Write | None = own("pwrite") or (below.pwrite if below else None)
        self.trim: _Range | None = own("trim") or (
            below.trim if below and layer.can_trim() else None
        )
        self.zero: _Range | None = own("zero") or (below.zero if below else None)
        native = layer.can_zero() == ZeroMode.NATIVE
        if not native and (below is None or own("can_zero") is not None):
            self.zero = self.zero_fua = None
        self.flush = own("flush") or (below.flush if below and below.can_flush() else None)
        self.mode = mode
        self.carries = carries
        self.offered = Fua.NONE

    def bind(
        self,
    ) -> tuple[_Write, _Range, _Range]:
        """pwrite, trim and zero. Raises OpenError where FUA would be offered on hope."""
        layer = self.layer
        if self.pwrite is None and self.pwrite_fua is None:
            raise OpenError(f"{layer.where}: can_write is true, but there is no pwrite")
        if layer.can_trim() and self.trim is None and self.trim_fua is None:
            raise OpenError(f"{layer.where}: can_trim is true, but there is no trim")
        if layer.can_flush() and self.flush is None:
            raise OpenError(f"{layer.where}: can_flush is true, but there is no flush")

        offered = self._is_offered()
        pwrite_mode = self._mode_of(self.pwrite_fua)
        trim_mode = self._mode_of(self.trim_fua)
        zero_mode = self._mode_of(self.zero_fua)
        if offered:
            self._refuse_hope(pwrite_mode, trim_mode)
            self.offered = pwrite_mode
        pwrite = self._pwrite(pwrite_mode)
        trim = self._trim(trim_mode)
        return pwrite, trim, self._zero(zero_mode, pwrite_mode, pwrite)

    def _is_offered(self) -> bool:
        if self.mode is None:
            return self.pwrite_fua is not None or (
                self.layer.can_flush() and self.flush is not None
            )
        return bool(self.mode)

    def _mode_of(self, fua_form: Callable[..., Any] | None) -> int:
        """How one operation keeps FUA: NATIVE, EMULATE, or NONE (it has no way)."""
        emulate = Fua.EMULATE if self.flush is not None else Fua.NONE
        if self.mode is None or self.mode is True:
            return Fua.NATIVE if fua_form is not None else emulate
        if self.mode == Fua.NATIVE:
            return Fua.NATIVE if fua_form is not None or self.carries else emulate
        if self.mode == Fua.EMULATE:
            return emulate
        return Fua.NONE

    def _refuse_hope(self, pwrite_mode: int, trim_mode: int) -> None:
        where = self.layer.where
        if pwrite_mode == Fua.NONE:
            raise OpenError(
                f"{where}: FUA is offered, but there is no flush to emulate it with"
                " (add flush, or have can_fua answer NONE)"
            )
        if self.layer.can_trim() and trim_mode == Fua.NONE:
            raise OpenError(
                f"{where}: FUA is offered and trim exists, but neither flush nor trim_fua"
                " (add one of them, or have can_fua answer NONE)"
            )

    def _pwrite(self, mode: int) -> _Write:
        plain, form, flush = self.pwrite, self.pwrite_fua, self.flush
        base: _Write
        if form is not None:
            if mode == Fua.NATIVE:
                return lambda buf, offset, flags=0: form(buf, offset, bool(flags & 2))  # type: ignore[misc]

            def without_flag(buf: Buffer, offset: int, flags: int = 0) -> None:
                form(buf, offset, False)

            base = without_flag
        else:
            assert plain is not None
            base = plain
        if mode == Fua.NATIVE or flush is None or mode == Fua.NONE:
            return base

        def emulated(buf: Buffer, offset: int, flags: int = 0) -> None:
            if flags & 2:
                base(buf, offset, flags & ~2)
                flush(0)
            else:
                base(buf, offset, flags)

        return emulated

    def _trim(self, mode: int) -> _Range:
        plain, form, flush = self.trim, self.trim_fua, self.flush
        base: _Range
        if form is not None:
            if mode == Fua.NATIVE:
                return lambda count, offset, flags=0: form(count, offset, bool(flags & 2))  # type: ignore[misc]

            def without_flag(count: int, offset: int, flags: int = 0) -> None:
                form(count, offset, False)

            base = without_flag
        elif plain is not None:
            base = plain
        else:
            return _no_trim
        if mode == Fua.NATIVE or flush is None or mode == Fua.NONE:
            return base

        def emulated(count: int, offset: int, flags: int = 0) -> None:
            base(count, offset, flags & ~2)
            if flags & 2:
                flush(0)

        return emulated

    def _zero(self, mode: int, pwrite_mode: int, pwrite: _Write) -> _Range:
        plain, form, flush = self.zero, self.zero_fua, self.flush
        own, below = self.layer.own, self.layer.next
        untouched = form is None and below is not None and own("zero") is None
        if plain is not None and untouched and (mode == Fua.NATIVE or not self.offered):
            return plain  # the layer below fills its own gaps

        session = self.layer.session
        each_piece = pwrite_mode == Fua.NATIVE
        if below is not None and own("can_fua") is None:
            each_piece = below.can_fua() == Fua.NATIVE  # else each piece would be flushed

        def by_pwrite(count: int, offset: int, flags: int) -> None:
            if flags & Flag.FAST_ZERO:
                raise OSError(errno.EOPNOTSUPP, "zero would be no faster than writing")
            write_zeros(pwrite, flush, count, offset, flags & 2, each_piece, session)

        native: _Range
        if form is not None:

            def with_flag(count: int, offset: int, flags: int) -> None:
                form(count, offset, bool(flags & Flag.MAY_TRIM), bool(flags & 2))

            native = with_flag
        elif plain is not None:
            native = plain
        else:
            return lambda count, offset, flags=0: by_pwrite(count, offset, flags)  # type: ignore[misc]

        def zero(count: int, offset: int, flags: int = 0) -> None:
            fua = flags & 2
            if fua and mode == Fua.NONE:
                by_pwrite(count, offset, flags)  # pwrite_fua is the only way to keep it
                return
            try:
                native(count, offset, flags if mode == Fua.NATIVE else flags & ~2)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOTSUP) or flags & Flag.FAST_ZERO:
                    raise
                by_pwrite(count, offset, flags)
                return
            if fua and mode == Fua.EMULATE:
                assert flush is not None
                flush(0)

        return zero


def _no_trim(*_: object) -> None:
    raise OSError(errno.EINVAL, "this device cannot trim")
