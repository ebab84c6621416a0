"""A client: look at a disk, write to it durably, read it back. `hello_client.py URI`."""

import sys

from pynbdkit.client import connect

with connect(sys.argv[1]) as disk:
    print(f"connected to {sys.argv[1]}")
    print(f"size {disk.size} bytes")
    disk.write(b"hello, disk", 4096, fua=True)
    print("wrote 11 bytes at 4096, on stable storage")
    print("read back:", disk.read(11, 4096))
