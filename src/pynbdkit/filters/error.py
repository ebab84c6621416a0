"""error: make requests fail, some or all, to test clients (nbdkit-error-filter(1)).

Each operation has an error, a rate and a trigger file; `error`, `error-rate` and `error-file` set
those of every operation, and of two settings the later one holds. Only operations with a rate are
overridden, so the others cost nothing. A flush never fails here (nor does the peer's).
"""

from __future__ import annotations

import errno
import os
import random

from .. import parameters
from ..filter import Filter, FilterDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ..complete import Layer
    from ..device import Device
    from ..session import Session

OPERATIONS = ("pread", "pwrite", "trim", "zero", "extents", "cache")
ERRORS = ("EPERM", "EIO", "ENOMEM", "EINVAL", "ENOSPC", "EOVERFLOW", "ESHUTDOWN")


def _error(what: str, **options: Any) -> Any:
    return parameters.enum(f"The error that {what} get", ERRORS, default="EIO", **options)


def _rate(what: str, **options: Any) -> Any:
    options.setdefault("default", 0.0)
    return parameters.probability(f"How many {what} fail", metavar="0%..100%|0..1", **options)


def _file(what: str, **options: Any) -> Any:
    return parameters.path(f"{what} fail only while this file exists", metavar="FILE", **options)


class ErrorFilter(Filter):
    """Inject errors into replies."""

    longname = "error injection filter"
    forkable = True

    error = _error("all requests", sets=[f"error_{name}" for name in OPERATIONS])
    error_rate = _rate("of all requests", sets=[f"error_{name}_rate" for name in OPERATIONS])
    error_file = _file("All requests", sets=[f"error_{name}_file" for name in OPERATIONS])
    error_pread = _error("reads")
    error_pread_rate = _rate("reads")
    error_pread_file = _file("Reads")
    error_pwrite = _error("writes")
    error_pwrite_rate = _rate("writes")
    error_pwrite_file = _file("Writes")
    error_trim = _error("trims")
    error_trim_rate = _rate("trims")
    error_trim_file = _file("Trims")
    error_zero = _error("zeroes")
    error_zero_rate = _rate("zeroes")
    error_zero_file = _file("Zeroes")
    error_extents = _error("block status requests")
    error_extents_rate = _rate("block status requests")
    error_extents_file = _file("Block status requests")
    error_cache = _error("cache requests")
    error_cache_rate = _rate("cache requests")
    error_cache_file = _file("Cache requests")

    def __init__(self, **values: object) -> None:
        super().__init__(**values)
        self.random = random.Random()
        """Decides which requests fail; seed it to have the same ones fail every time."""

    def after_fork(self) -> None:
        """Have each worker draw for itself, not all the same."""
        if self.worker_count > 1:
            self.random.seed()

    def open(self, next: Callable[[Session], Layer], session: Session) -> Device:
        """A device that fails as configured."""
        return ErrorDevice(next(session), self)


class ErrorDevice(FilterDevice):
    """The next layer, with errors."""

    def __init__(self, next: Layer, settings: ErrorFilter) -> None:
        super().__init__(next)
        # Both extents and block_status answer block status requests.
        pairs = [*((name, name) for name in OPERATIONS), ("block_status", "extents")]
        for name, setting in pairs:
            if getattr(settings, f"error_{setting}_rate") > 0:
                setattr(self, name, _failing(setting, getattr(next, name), settings))


def _failing(name: str, operation: Callable[..., Any], settings: ErrorFilter) -> Callable[..., Any]:
    word: str = getattr(settings, f"error_{name}")
    rate: float = getattr(settings, f"error_{name}_rate")
    trigger: str | None = getattr(settings, f"error_{name}_file")
    number = getattr(errno, word)
    draw = settings.random.random

    def failing(*arguments: Any) -> Any:
        # draw() < 1.0 always: a rate of 100% never lets a request through.
        if draw() < rate and (trigger is None or os.path.exists(trigger)):
            raise OSError(number, f"injecting {word} error into {name}")
        return operation(*arguments)

    return failing
