"""The data format of nbdkit-data-plugin(1), without anything of a server.

`language.py` reads the text, `source.py` the files and scripts that it names, and `image.py` is
what comes out: the bytes of a disk, described rather than stored.
"""

from .image import Image, from_bytes
from .language import parse

__all__ = ["Image", "from_bytes", "parse"]
