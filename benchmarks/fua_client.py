"""A client that sends FUA writes, at a depth, for a time: fio's `nbd` engine never sets the flag.

It runs as a process of its own, under a Python that has libnbd's `nbd` module (which need not be
the Python that runs the benchmark), and talks to it in lines: it prepares the disk, prints
`ready`, waits for a line, measures, and prints one line of JSON. So whoever started it can read the
server's CPU clock exactly around what was measured, preparation left out.

"A dirty file behind them": `--dirty BYTES` of the disk's second half are written without FUA and
without a flush before the clock starts. `--stream RATE` keeps doing so while it runs: a second
connection writes 64 KiB at a time, at RATE bytes a second, as a guest does that writes files while
its database commits. The FUA writes go to random places in the first half.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time

import nbd

BLOCK = 4096
CHUNK = 1 << 20
STREAM_CHUNK = 64 << 10


def dirty(handle: nbd.NBD, start: int, count: int) -> None:
    """Write `count` bytes from `start` on, unflushed."""
    data = random.randbytes(CHUNK)
    for offset in range(start, start + count, CHUNK):
        handle.pwrite(data, offset)


def stream(uri: str, start: int, count: int, rate: int, stop: threading.Event) -> None:
    """Keep writing over `count` bytes from `start` on, at `rate` bytes a second, unflushed."""
    handle = nbd.NBD()
    handle.connect_uri(uri)
    data = random.randbytes(STREAM_CHUNK)
    begin = time.perf_counter()
    written = 0
    while not stop.is_set():
        handle.pwrite(data, start + written % count)
        written += STREAM_CHUNK
        stop.wait(max(0.0, begin + written / rate - time.perf_counter()))
    handle.shutdown()


def measure(handle: nbd.NBD, span: int, depth: int, seconds: float) -> tuple[int, float]:
    """Keep `depth` FUA writes in flight for `seconds`; answer how many ended, and in what time."""
    buffer = nbd.Buffer.from_bytearray(bytearray(random.randbytes(BLOCK)))
    blocks = span // BLOCK
    offsets = [random.randrange(blocks) * BLOCK for _ in range(1 << 14)]
    mask = len(offsets) - 1
    sent = done = 0
    begin = time.perf_counter()
    end = begin + seconds
    while True:
        if time.perf_counter() < end:
            while sent - done < depth:
                handle.aio_pwrite(buffer, offsets[sent & mask], flags=nbd.CMD_FLAG_FUA)
                sent += 1
        elif sent == done:
            return done, time.perf_counter() - begin
        handle.poll(-1)
        while sent > done and (cookie := handle.aio_peek_command_completed()) > 0:
            handle.aio_command_completed(cookie)
            done += 1


def main() -> int:
    parser = argparse.ArgumentParser(description="FUA writes against an NBD server")
    parser.add_argument("uri")
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--dirty", type=int, default=0, help="bytes made dirty before")
    parser.add_argument("--stream", type=int, default=0, help="bytes a second made dirty meanwhile")
    args = parser.parse_args()

    handle = nbd.NBD()
    handle.connect_uri(args.uri)
    if not handle.can_fua():
        print("the server does not offer FUA", file=sys.stderr)
        return 1
    half = handle.get_size() // 2 // CHUNK * CHUNK
    dirty(handle, half, min(args.dirty, half))
    stop = threading.Event()
    writer = threading.Thread(target=stream, args=(args.uri, half, half, args.stream, stop))
    print("ready", flush=True)
    if not sys.stdin.readline():
        return 1
    if args.stream:
        writer.start()
    requests, seconds = measure(handle, half, args.depth, args.seconds)
    stop.set()
    if args.stream:
        writer.join()
    handle.shutdown()
    print(json.dumps({"requests": requests, "seconds": seconds}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
