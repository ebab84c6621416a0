"""data: a disk whose bytes stand on the command line (nbdkit-data-plugin(1)).

The text becomes an image (`_data`): what the disk holds, described rather than stored. A disk
without much data is copied into memory, as the memory plugin has it; one that would fill it
(`1*1000000000000`) stays an image, with what clients write kept above it, page by page.
"""

from __future__ import annotations

from .. import log, parameters
from ..errors import ConfigError
from ..plugin import Plugin
from .memory import MAX_MAPPED, MappedDisk, SharedDisk, SparseDevice, parse_allocator

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Final

    from ..device import Device
    from ..session import Session
    from ..sparse import SparseArray
    from ._data import Image

COPIED: Final = 64 << 20
"""A sparse disk with more bytes of data than this stays an image."""
_PIECE: Final = 64 << 10  # what a short piece of data costs in memory
_SOURCES: Final = ("data", "raw", "base64")


class DataPlugin(Plugin):
    """A small disk given on the command line."""

    name = "data"
    longname = "nbdkit data plugin"
    description = "A disk whose bytes stand on the command line; what is written is not kept"
    blocking = False
    forkable = True

    data = parameters.text("The disk in the data format", magic=True, metavar="DATA")
    raw = parameters.text("The disk's bytes as they are", metavar="BYTES")
    base64 = parameters.text("The disk's bytes in base64", metavar="BASE64")
    size = parameters.size("Cut or extend the disk to this size", metavar="SIZE")
    allocator = parameters.text(
        "Backend allocation strategy", default="sparse", metavar="sparse|malloc[,mlock=true]"
    )

    def __init__(self, **values: object) -> None:
        self._variables: dict[str, str] = {}
        self._used: set[str] = set()
        super().__init__(**values)

    def config(self, key: str, value: str) -> None:
        """Parameters, once each where they are the disk; any other key is a $VARIABLE."""
        if key in _SOURCES and self._given():
            raise ConfigError("data, raw or base64 must be given exactly once")
        if not self.take_parameter(key, value):
            self._variables.setdefault(key, value)

    def config_complete(self) -> None:
        """Check that there is a disk, and the allocator."""
        given = self._given()
        if len(given) != 1:
            how = "only one of " if given else "the disk is not specified: give "
            raise ConfigError(how + "data=DATA, raw=BYTES or base64=BASE64")
        try:
            self._kind, self._locked = parse_allocator(self.allocator)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def get_ready(self) -> None:
        """Make the disk, while paths are still those of the command line."""
        image = self._image()
        for key in sorted(self._variables.keys() - self._used):
            log.warning(f"parameter '{key}' is not used: the data has no ${key}")
        self._disk: MappedDisk | SparseArray
        if self._kind == "sparse" and (image.size > MAX_MAPPED or _is_large(image)):
            if self.worker_count > 1:
                raise ConfigError(
                    "a disk of over 16T, or with more than 64M of data, is kept by one process:"
                    " leave --workers out, or give allocator=malloc"
                )
            from ..sparse import SparseArray

            self._disk = SparseArray(image.size, image)
        elif image.size > MAX_MAPPED:
            raise ConfigError(f"size {image.size} is too large for allocator={self._kind}")
        else:
            disk = MappedDisk if self.worker_count == 1 else SharedDisk
            self._disk = disk(image.size, self._kind == "sparse", self._locked)
            for start, end in image.data(0, image.size):
                image.fill(self._disk.view[start:end], start)
                self._disk.mark(end - start, start)

    def open(self, session: Session) -> Device:
        """Every connection sees the same disk."""
        if isinstance(self._disk, MappedDisk):
            return self._disk.device()
        return SparseDevice(self._disk)

    def dump_plugin(self) -> Iterable[tuple[str, str]]:
        """What the peer prints."""
        return [("data_base64", "yes"), ("mlock", "yes"), ("zstd", "no")]

    def _given(self) -> list[str]:
        return [key for key in _SOURCES if getattr(self, key) is not None]

    def _image(self) -> Image:
        import os

        from ._data import from_bytes, parse

        if self.data is not None:
            image = parse(self.data, self._variable, limit=self.size)
        elif self.raw is not None:
            image = from_bytes(os.fsencode(self.raw))
        else:
            image = from_bytes(_from_base64(self.base64))
        return image if self.size is None else image.resize(self.size)

    def _variable(self, name: str) -> str | None:
        import os

        self._used.add(name)
        text = self._variables.get(name)
        return os.environ.get(name) if text is None else text


def _is_large(image: Image) -> bool:
    """Whether copying all of its data takes more memory than `COPIED`."""
    total = 0
    for start, end in image.data(0, image.size):
        total += max(end - start, _PIECE)
        if total > COPIED:
            return True
    return False


def _from_base64(text: str) -> bytes:
    """Strictly, but for white space."""
    import base64

    packed = "".join(text.split())
    try:
        content = base64.b64decode(packed, validate=True)
        if base64.b64encode(content).decode() == packed:
            return content
        reason = "bits are left over at the end"
    except ValueError as error:
        reason = str(error)
    raise ConfigError(f"base64: cannot be decoded: {reason}")
