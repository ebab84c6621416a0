"""Images: the bytes of a disk, described instead of stored, so that huge ones cost nothing.

An image is immutable and is one of four things: a hole, bytes, pieces (images side by side with
holes between them) or a repetition. `(0x55 0xAA)*1000000000` is a repetition of a few bytes, and
`@0x10000000000 1` is one byte after a terabyte of hole: both are read, cut and put into larger
images as they are, and a part of them becomes bytes only when somebody reads it.

All offsets and sizes are bytes. Zeros and holes are the same thing: they read alike.
"""

from __future__ import annotations

from bisect import bisect_right

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Final

MAX_SIZE: Final = (1 << 63) - 1
"""The largest disk (nbdkit-data-plugin(1), "size")."""

_FLAT: Final = 32768  # an image up to this size is plain bytes; also the step of zero detection
_TILE: Final = 4096  # a shorter period is written out to about this much
_SPLICE: Final = 64  # an image of up to so many pieces is dissolved in the one that holds it
_JOIN: Final = 512  # a hole up to this size between two runs of bytes is stored as zeros
_DEPTH: Final = 100  # images within images; bounds the recursion of every method
_SOLID: Final = 2 * _FLAT - 1  # a hole of this length has a whole aligned page in it
_ZEROS: Final = bytes(_FLAT)


class Image:
    """A read-only run of `size` bytes.

    `lead` and `trail` are the holes at its ends, or less; `gap` is the longest hole that is known
    of in it; `depth` counts the images within images.
    """

    __slots__ = ("depth", "gap", "lead", "size", "trail")

    def __init__(self, size: int, lead: int = 0, gap: int = 0, trail: int = 0, depth: int = 0):
        if size > MAX_SIZE:
            raise ValueError("the disk would be larger than 2**63 - 1 bytes")
        if depth > _DEPTH:
            raise ValueError(f"expressions are built on each other more than {_DEPTH} deep")
        self.size = size
        self.lead = lead
        self.gap = gap
        self.trail = trail
        self.depth = depth

    def fill(self, out: memoryview, offset: int) -> None:
        """Copy the bytes from `offset` on into `out`, which is all zeros, until it is full."""
        raise NotImplementedError

    def cut(self, start: int, end: int) -> Image:
        """The part from `start` to before `end`."""
        raise NotImplementedError

    def data(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """(start, end) of what may hold data in that range, in order; the rest is holes.

        Holes too short to have an aligned 32 KiB page in them may be left out, so that a range
        is answered in steps that do not depend on how often something in it repeats.
        """
        if self.gap < _SOLID:
            first, last = max(start, self.lead), min(end, self.size - self.trail)
            if first < last:
                yield first, last
        else:
            yield from self._walk(start, end)

    def _walk(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """`data` where there are holes to tell of."""
        raise NotImplementedError

    def read(self, count: int, offset: int) -> bytearray:
        """A new buffer with `count` bytes from `offset` on."""
        buffer = bytearray(count)
        if count:
            self.fill(memoryview(buffer), offset)
        return buffer

    def resize(self, size: int) -> Image:
        """Cut to `size`, or extended to it by a hole."""
        if size <= self.size:
            return self.cut(0, size)
        builder = Builder()
        builder.put(self)
        builder.move(size)
        return builder.finish()

    def repeat(self, times: int) -> Image:
        """This image, `times` times."""
        size = self.size * times
        if not size:
            return Hole(0)
        if times == 1:
            return self
        return _flat(Repeat(self, size))


class Hole(Image):
    """Nothing but zeros."""

    __slots__ = ()

    def __init__(self, size: int) -> None:
        super().__init__(size, size, size, size)

    def fill(self, out: memoryview, offset: int) -> None:
        """Leave the zeros alone."""

    def cut(self, start: int, end: int) -> Image:
        """A shorter hole."""
        return Hole(end - start)

    def data(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Nothing."""
        return iter(())

    def repeat(self, times: int) -> Image:
        """A longer hole."""
        return Hole(self.size * times)


class Bytes(Image):
    """Bytes as they are."""

    __slots__ = ("content",)

    def __init__(self, content: bytes | memoryview) -> None:
        super().__init__(len(content))
        self.content = content

    def fill(self, out: memoryview, offset: int) -> None:
        """Copy."""
        out[:] = self.content[offset : offset + len(out)]

    def cut(self, start: int, end: int) -> Image:
        """A part: a copy of its own where that is short, else a view."""
        if end - start == self.size:
            return self
        part = memoryview(self.content)[start:end]
        return from_bytes(part.tobytes()) if end - start <= _FLAT else Bytes(part)


class Repeat(Image):
    """`period` over and over for `size` bytes, beginning at the byte `phase` of it."""

    __slots__ = ("period", "phase")
    period: Image
    phase: int

    def __init__(self, period: Image, size: int, phase: int = 0) -> None:
        if isinstance(period, Repeat) and not period.phase and not period.size % period.period.size:
            period = period.period
        if isinstance(period, Bytes) and period.size < _TILE:
            period = Bytes(bytes(period.content) * (-(-_TILE // period.size)))
        stop = (phase + size) % period.size or period.size  # where in a period it ends
        lead = max(period.lead - phase, 0)
        trail = max(stop - (period.size - period.trail), 0)
        gap = max(period.gap, period.lead + period.trail)
        super().__init__(size, lead, gap, trail, period.depth + 1)
        self.period = period
        self.phase = phase

    def fill(self, out: memoryview, offset: int) -> None:
        """Fill the first period, then double what is there."""
        length = self.period.size
        phase = (offset + self.phase) % length
        done = 0
        while done < len(out) and done < length:
            step = min(len(out) - done, length - phase, length - done)
            self.period.fill(out[done : done + step], phase)
            done += step
            phase = 0
        while done < len(out):
            step = min(done, len(out) - done)
            out[done : done + step] = out[:step]
            done += step

    def cut(self, start: int, end: int) -> Image:
        """A shorter repetition, or a part of one period."""
        size = end - start
        if size == self.size:
            return self
        phase = (start + self.phase) % self.period.size
        if phase + size <= self.period.size:
            return self.period.cut(phase, phase + size)
        return _flat(Repeat(self.period, size, phase))

    def _walk(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        length = self.period.size
        while start < end:
            phase = (start + self.phase) % length
            step = min(end - start, length - phase)
            for first, last in self.period.data(phase, phase + step):
                yield start - phase + first, start - phase + last
            start += step


class Pieces(Image):
    """Images in order, each at its offset; what is between them is a hole."""

    __slots__ = ("parts", "starts")

    def __init__(self, size: int, starts: list[int], parts: list[Image]) -> None:
        lead, gap, hole, position, depth = -1, 0, 0, 0, 0
        for start, part in zip(starts, parts, strict=True):
            hole += start - position + part.lead
            gap = max(gap, hole, part.gap)
            lead = hole if lead < 0 else lead
            hole = part.trail
            position = start + part.size
            depth = max(depth, part.depth)
        hole += size - position
        super().__init__(size, lead, max(gap, hole), hole, depth + 1)
        self.starts = starts
        self.parts = parts

    def _within(self, start: int, end: int) -> Iterator[tuple[int, Image, int, int]]:
        """The pieces in a range: each one's offset, itself, and the part of it that is wanted."""
        index = max(bisect_right(self.starts, start) - 1, 0)
        while index < len(self.starts) and self.starts[index] < end:
            begin, part = self.starts[index], self.parts[index]
            first, last = max(start - begin, 0), min(end - begin, part.size)
            if first < last:
                yield begin, part, first, last
            index += 1

    def fill(self, out: memoryview, offset: int) -> None:
        """Copy every piece to its place."""
        for begin, part, first, last in self._within(offset, offset + len(out)):
            part.fill(out[begin + first - offset : begin + last - offset], first)

    def cut(self, start: int, end: int) -> Image:
        """The pieces of the range, those at its ends cut."""
        builder = Builder()
        for begin, part, first, last in self._within(start, end):
            builder.move(begin + first - start)
            builder.put(part.cut(first, last))
        builder.move(end - start)
        return builder.finish()

    def _walk(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        for begin, part, first, last in self._within(start, end):
            for left, right in part.data(first, last):
                yield begin + left, begin + right


class Builder:
    """Puts images at offsets, later ones over earlier ones; `finish` gives the whole.

    `offset` is where the next image goes, `size` the end of all that was put or moved to.
    """

    def __init__(self) -> None:
        self.offset = 0
        self.size = 0
        self._starts: list[int] = []
        self._parts: list[Image] = []
        self._end = 0  # of the last piece; always beyond every other one
        self._run = bytearray()  # the last piece, while short runs of bytes are joined to it

    def move(self, offset: int) -> None:
        """Go to an offset; raises ValueError beyond the largest disk."""
        if offset > MAX_SIZE:
            raise ValueError("the disk would be larger than 2**63 - 1 bytes")
        self.offset = offset
        self.size = max(self.size, offset)

    def put(self, image: Image) -> None:
        """Write an image, holes included, over whatever is at the offset, and move on."""
        start = self.offset
        self.move(start + image.size)
        if not image.size:
            return
        if start < self._end:
            self._clear(start, start + image.size)
        if isinstance(image, Hole):
            return
        if start < self._end:
            self._insert(start, image)
        elif isinstance(image, Pieces) and len(image.parts) <= _SPLICE:
            for begin, part in zip(image.starts, image.parts, strict=True):
                self._append(start + begin, part)
        else:
            self._append(start, image)

    def finish(self) -> Image:
        """The image of all that was put."""
        self._close()
        if not self._parts:
            return Hole(self.size)
        if len(self._parts) == 1 and self._parts[0].size == self.size:
            return self._parts[0]
        return _flat(Pieces(self.size, self._starts, self._parts))

    def _append(self, start: int, image: Image) -> None:
        if isinstance(image, Bytes) and image.size <= _FLAT:
            hole = start - self._end
            if not self._run or hole > _JOIN:
                self._close()
                self._starts.append(start)
                self._parts.append(image)  # its place; _close puts the joined run there
            else:
                self._run += bytes(hole)
            self._run += image.content
        else:
            self._close()
            self._starts.append(start)
            self._parts.append(image)
        self._end = start + image.size

    def _close(self) -> None:
        if self._run:
            self._parts[-1] = Bytes(bytes(self._run))
            self._run = bytearray()

    def _insert(self, start: int, image: Image) -> None:
        """Between pieces; the place is clear."""
        index = bisect_right(self._starts, start)
        self._starts.insert(index, start)
        self._parts.insert(index, image)

    def _clear(self, start: int, end: int) -> None:
        """Make a hole, cutting the pieces at its ends."""
        self._close()
        starts, parts = self._starts, self._parts
        index = max(bisect_right(starts, start) - 1, 0)
        new_starts: list[int] = []
        new_parts: list[Image] = []
        if starts[index] + parts[index].size <= start:
            index += 1
        stop = index
        while stop < len(starts) and starts[stop] < end:
            begin, part = starts[stop], parts[stop]
            for first, last in ((0, start - begin), (end - begin, part.size)):
                if first < last:
                    rest = part.cut(first, last)
                    if not isinstance(rest, Hole):
                        new_starts.append(begin + first)
                        new_parts.append(rest)
            stop += 1
        starts[index:stop] = new_starts
        parts[index:stop] = new_parts
        self._end = starts[-1] + parts[-1].size if starts else 0


def from_bytes(content: bytes) -> Image:
    """An image of these bytes; long stretches of zeros in them are given back."""
    if len(content) <= _FLAT:
        return Hole(len(content)) if content == _ZEROS[: len(content)] else Bytes(content)
    builder = Builder()
    view = memoryview(content)
    begin = 0
    for start in range(0, len(content), _FLAT):
        end = min(start + _FLAT, len(content))
        if content.startswith(_ZEROS[: end - start], start):
            builder.put(Bytes(view[begin:start]))
            builder.move(end)
            begin = end
    builder.put(Bytes(view[begin:]))
    return builder.finish()


def _flat(image: Image) -> Image:
    """Plain bytes instead of an image that is short."""
    return from_bytes(bytes(image.read(image.size, 0))) if image.size <= _FLAT else image
