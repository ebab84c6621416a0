"""The heap stays where it is between batches of large replies."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import resource
from pynbdkit import heap
if {keep}:
    heap.keep()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        held = [b"x" * 262144 for _ in range(8)]
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def faults(keep: bool) -> int:
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(keep=keep)], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def test_no_page_is_fetched_twice() -> None:
    assert faults(keep=True) < 100
    assert faults(keep=False) > 10_000  # else glibc has learnt it, and the module can go
