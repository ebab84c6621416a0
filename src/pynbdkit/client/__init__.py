"""A small synchronous NBD client over ``pynbdkit.protocol``.

from pynbdkit.client import connect

with connect("nbd://localhost/disk") as client:
    client.write(b"hello", offset=512, fua=True)
    print(client.size, client.read(5, offset=512))
"""

from __future__ import annotations

from .connection import Client, connect
from .uri import Uri, UriError, parse_uri

__all__ = ["Client", "Uri", "UriError", "connect", "parse_uri"]
