"""A client that sends FUA writes at a depth: fio's `nbd` engine never sets the flag.

It runs as a process of its own, under a Python that has libnbd's `nbd` module (which need not be
the Python that runs the benchmark), and obeys lines on stdin, answering each with one on stdout:

    dirty BYTES   write so much of the disk's second half, no FUA, no flush     -> ok
    writes COUNT  send COUNT FUA writes, wait for all replies    -> {"requests": …, "seconds": …}
    seconds TIME  keep FUA writes in flight for so long          -> the same

So whoever started it reads the server's CPU clock exactly around what is measured, and the dirty
pages that the FUA writes must not pay for are made through the server too, as a guest makes them.
The FUA writes, 4 KiB each, go to random places in the first half.
"""

from __future__ import annotations

import json
import random
import sys
import time

import nbd

BLOCK = 4096
CHUNK = 1 << 20


class Client:
    """One connection, and the places it writes to."""

    def __init__(self, uri: str, depth: int) -> None:
        self.handle = nbd.NBD()
        self.handle.connect_uri(uri)
        if not self.handle.can_fua():
            raise SystemExit("the server does not offer FUA")
        self.depth = depth
        self.half = self.handle.get_size() // 2 // CHUNK * CHUNK
        blocks = self.half // BLOCK
        self.offsets = [random.randrange(blocks) * BLOCK for _ in range(1 << 14)]
        self.sent = 0

    def dirty(self, count: int) -> None:
        """Write `count` bytes (at most half the disk) that nobody flushes."""
        data = random.randbytes(CHUNK)
        for offset in range(self.half, self.half + min(count, self.half), CHUNK):
            self.handle.pwrite(data, offset)

    def measure(self, count: float, seconds: float) -> str:
        """Send FUA writes until `count` or `seconds` is reached; wait for every reply."""
        handle, offsets, depth = self.handle, self.offsets, self.depth
        mask = len(offsets) - 1
        buffer = nbd.Buffer.from_bytearray(bytearray(random.randbytes(BLOCK)))
        first = self.sent
        sent = done = 0
        begin = time.perf_counter()
        end = begin + seconds
        while True:
            if sent < count and time.perf_counter() < end:
                while sent - done < depth and sent < count:
                    handle.aio_pwrite(buffer, offsets[first + sent & mask], flags=nbd.CMD_FLAG_FUA)
                    sent += 1
            elif sent == done:
                break
            handle.poll(-1)
            # libnbd raises here when a request failed: a traceback and exit status 1, no number.
            while sent > done and (cookie := handle.aio_peek_command_completed()) > 0:
                handle.aio_command_completed(cookie)
                done += 1
        elapsed = time.perf_counter() - begin
        self.sent += sent
        return json.dumps({"requests": done, "seconds": elapsed})

    def obey(self, verb: str, amount: float) -> str:
        if verb == "dirty":
            self.dirty(int(amount))
            return "ok"
        if verb == "writes":
            return self.measure(amount, float("inf"))
        if verb == "seconds":
            return self.measure(float("inf"), amount)
        raise SystemExit(f"unknown order {verb!r}")


def main() -> int:
    if len(sys.argv) != 3:
        raise SystemExit("usage: fua_client.py URI DEPTH")
    client = Client(sys.argv[1], int(sys.argv[2]))
    for line in sys.stdin:
        verb, amount = line.split()
        print(client.obey(verb, float(amount)), flush=True)
    client.handle.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
