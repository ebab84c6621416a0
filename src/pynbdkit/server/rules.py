"""Rules: which requests must be refused, and with which of the protocol's errors.

What is offered follows from the outermost layer's capabilities, so a request is checked against
them, the size and the block sizes alone, before any layer sees it.
"""

from __future__ import annotations

from ..flags import CacheMode, Fua, ZeroMode
from ..protocol.constants import (
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_DISC,
    CMD_FLAG_DF,
    CMD_FLAG_FAST_ZERO,
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    CMD_FLAG_REQ_ONE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    MAX_PAYLOAD,
    NBD_EINVAL,
    NBD_ENOSPC,
    NBD_EPERM,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection

    from ..complete import Layer


class Rules:
    """What one connection may ask for."""

    def __init__(self, layer: Layer, structured: bool, contexts: Collection[int] = ()) -> None:
        """Whether structured replies were negotiated, and the IDs of the metadata contexts."""
        self._structured = structured
        self._contexts = tuple(contexts)
        self._size = layer.get_size()
        minimum, _, maximum = layer.block_size()
        self._minimum = minimum or 1
        self._maximum = min(maximum or MAX_PAYLOAD, MAX_PAYLOAD)
        self._can_write = layer.can_write()
        self._can_flush = layer.can_flush()
        self._can_trim = layer.can_trim()
        self._can_zero = layer.can_zero() != ZeroMode.NONE
        self._can_fast_zero = layer.can_fast_zero()
        self._can_fua = layer.can_fua() != Fua.NONE
        self._can_cache = layer.can_cache() != CacheMode.NONE

    @property
    def any_block_size(self) -> bool:
        """Whether any offset and any length up to MAX_PAYLOAD can be read and written."""
        return self._minimum == 1 and self._maximum == MAX_PAYLOAD

    def check(
        self, flags: int, kind: int, offset: int, count: int, payload: memoryview | None
    ) -> tuple[int, str] | None:
        """Why a request must be refused, as (protocol's error, text); None: it is good.

        NBD protocol, "Request types" and "Command flags"; plugin-contract.md, "FUA".
        """
        fua = CMD_FLAG_FUA if self._can_fua else 0
        if kind == CMD_READ:
            allowed = fua | (CMD_FLAG_DF if self._structured else 0)
            possible = True
        elif kind == CMD_WRITE:
            allowed, possible = fua, True
        elif kind == CMD_FLUSH:
            allowed, possible = fua, self._can_flush
        elif kind == CMD_TRIM:
            allowed, possible = fua, self._can_trim or not self._can_write
        elif kind == CMD_CACHE:
            allowed, possible = fua, self._can_cache
        elif kind == CMD_WRITE_ZEROES:
            fast = CMD_FLAG_FAST_ZERO if self._can_fast_zero else 0
            allowed = fua | CMD_FLAG_NO_HOLE | fast
            possible = self._can_zero or not self._can_write
        elif kind == CMD_BLOCK_STATUS:
            allowed, possible = fua | CMD_FLAG_REQ_ONE, bool(self._contexts)
        elif kind == CMD_DISC:
            return 0, ""
        else:
            return NBD_EINVAL, f"unknown command {kind}"
        if not self._can_write and kind in (CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES):
            return NBD_EPERM, "the export is read-only"
        if not possible:
            return NBD_EINVAL, "not offered"
        if flags & ~allowed:
            return NBD_EINVAL, f"flags {flags & ~allowed:#x} are unknown, or not offered"
        if kind == CMD_FLUSH:
            return (NBD_EINVAL, "flush with offset or length") if offset or count else None
        if not count:
            return NBD_EINVAL, "length 0"
        if kind in (CMD_READ, CMD_WRITE) and count > self._maximum:
            return NBD_EINVAL, f"length {count} is more than {self._maximum}, the maximum"
        end = offset + count
        if end > self._size:
            error = NBD_ENOSPC if kind in (CMD_WRITE, CMD_WRITE_ZEROES) else NBD_EINVAL
            return error, f"beyond the end of the export ({self._size} bytes)"
        # A last block that is not whole can be reached, too.
        if offset % self._minimum or (end % self._minimum and end != self._size):
            return NBD_EINVAL, f"not aligned to {self._minimum} bytes, the minimum block size"
        if kind == CMD_WRITE and payload is None:
            return NBD_EINVAL, "no payload"
        return None

    def filtered(self, payload: memoryview | None) -> tuple[int, tuple[int, ...]] | None:
        """What a block status with a payload asks for, as (length, IDs of contexts).

        None where the payload is wrong: it has to name at least one of the contexts that were
        negotiated, each once (NBD protocol, "NBD_CMD_BLOCK_STATUS").
        """
        if payload is None or len(payload) < 12 or len(payload) % 4:
            return None
        count = int.from_bytes(payload[:8], "big")
        ids = tuple(int.from_bytes(payload[at : at + 4], "big") for at in range(8, len(payload), 4))
        if len(set(ids)) != len(ids) or not set(ids) <= set(self._contexts):
            return None
        return count, ids
