"""Company: whether one connection would better be served together with others that are busy.

Several busy connections with a thread each hand the interpreter's lock from one to the other all
the time. What that costs, beside what it brings that they work at the same time, depends on their
requests: the numbers here are measured (docs/performance.md, "What was changed").
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from .carousel import Carousel
    from .transmission import Transmission

SEVERAL: Final = 16
"""Others are busy when the score has come to this: each batch of our own that follows another
connection's counts 2, each that follows one of our own takes 1 away."""
SMALL_REQUEST: Final = 128 << 10
"""Requests of up to this many bytes are small: what runs them can do so for others, too.

Above that, connections with a thread each copy more at a time than they lose by handing over."""
MANY: Final = 8
"""From so many connections on, those are served together as well whose calls make none into the
kernel: fewer of them hand the lock over for a send and a receive only, and use both processors."""
FEW: Final = 2
"""The same where they store large payloads: they hold the lock for it, and others would wait."""
LARGE_WRITE: Final = 16 << 10
"""To copy so many bytes takes longer than to hand the lock over."""
HEAVY: Final = 8
"""What the score of large writes rises to: 2 for a batch that begins with one, -1 for another."""


class Company:
    """What one connection knows of its own batches and of others'."""

    def __init__(self, carousel: Carousel, who: Transmission, in_memory: bool) -> None:
        """`who` it is; `in_memory`: its calls make none into the kernel."""
        self._carousel = carousel
        self._who = who
        self._in_memory = in_memory
        self._score = 0
        self._heavy = 0

    @property
    def alone(self) -> bool:
        """Whether no other connection is busy."""
        return not self._score

    def look_around(self, count: int, stores: bool) -> None:
        """Our own thread has received a batch; its first request as in `weigh`."""
        self.weigh(count, stores)
        carousel = self._carousel
        if carousel.last is not self._who:
            carousel.last = self._who
            self._score = min(self._score + 2, SEVERAL)
        elif self._score:
            self._score -= 1

    def weigh(self, count: int, stores: bool) -> None:
        """A batch begins with a request of `count` bytes; `stores`: it brings them as payload."""
        if stores and count >= LARGE_WRITE:
            self._heavy = min(self._heavy + 2, HEAVY)
        elif self._heavy:
            self._heavy -= 1

    def forget(self) -> None:
        """Begin again to find out whether others are busy."""
        self._score = 0

    def found(self, count: int) -> bool:
        """Whether others are busy, and requests of `count` bytes would suit them."""
        return self._score >= SEVERAL and self.suits(count)

    def suits(self, count: int) -> bool:
        """Whether there are enough connections to serve requests of `count` bytes together."""
        if count > SMALL_REQUEST:
            return False
        if not self._in_memory:
            return True
        return self._carousel.connections >= (FEW if self._heavy else MANY)
