"""The small sets of numbers that plugins, filters and the server exchange.

Values are those of nbdkit-plugin(3), so that scripts and C plugins may be handed them unchanged.
They are plain integers in a namespace (not `enum` members) because a flag test stands on the way
of every request, and an `enum.IntFlag` operation costs ten times an integer one.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final


class Flag:
    """Flags of a request, as pread, pwrite, trim, zero, cache and extents get them."""

    MAY_TRIM: Final = 1
    """zero may make a hole (the opposite of the protocol's NO_HOLE)."""
    FUA: Final = 2
    """The reply means that this write is on stable storage."""
    REQ_ONE: Final = 4
    """extents: the client wants the first extent only."""
    FAST_ZERO: Final = 8
    """zero: fail with EOPNOTSUPP at once when it is not faster than writing."""


class Fua:
    """Answers of `Device.can_fua`."""

    NONE: Final = 0
    EMULATE: Final = 1
    NATIVE: Final = 2


class CacheMode:
    """Answers of `Device.can_cache`."""

    NONE: Final = 0
    EMULATE: Final = 1
    NATIVE: Final = 2


class ZeroMode:
    """Answers of `FilterDevice.can_zero` (a plugin's answer is a boolean: it never hides zero)."""

    NONE: Final = 0
    EMULATE: Final = 1
    NATIVE: Final = 2


class ThreadModel:
    """How many requests a plugin or filter stands at one time; the strictest layer decides."""

    SERIALIZE_CONNECTIONS: Final = 0
    """One client at a time; others wait."""
    SERIALIZE_ALL_REQUESTS: Final = 1
    """One request at a time in the whole server."""
    SERIALIZE_REQUESTS: Final = 2
    """One request at a time per connection."""
    PARALLEL: Final = 3
    """Any number at a time."""


THREAD_MODEL_NAMES: Final = (
    "serialize_connections",
    "serialize_all_requests",
    "serialize_requests",
    "parallel",
)
