"""Waiting: telling calls that wait, which threads help, from calls that are held up, or compute.

A call that goes into the kernel gives the interpreter's lock up, and wants it back after. Where
other threads are busy that takes long, and so does the way to a processor that others want: from
outside, it looks as if the call had waited. Then threads are of no use: they cannot get more done,
and hold each other up.
"""

from __future__ import annotations

from binascii import crc32
from time import perf_counter, process_time, sleep, thread_time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

SLOW_CALL: Final = 60e-6
"""Seconds per call over which calls that declare nothing are suspected to wait."""
QUICK_CALL: Final = 50e-6
"""Seconds per call under which threads stop paying."""
BUSY: Final = 0.7
"""Processors that this process uses, from which on more threads hardly get more done."""
BY_FAR: Final = 8
"""So many times as long as a call that does not wait takes one of which a busy process is no
explanation: connections that wait should not have to do without threads because others work."""
EVIDENCE: Final = 0.005
"""Seconds in calls before it is judged whether they wait: the kernel's figures are coarse."""
TRUST: Final = 0.05
"""Seconds for which calls that were found not to wait are not suspected again."""
TIMES: Final = 8
"""Calls that are compared with."""
BYTES_PER_SECOND: Final = 4e9
"""About how fast the checksum of such a call is computed."""
LEAST: Final = 6 << 10
"""Bytes of a checksum for which the interpreter is given up."""
_BLOCK: Final = memoryview(bytes(1 << 20))


def wait(calls: float, wall: float, cpu: float, switches: float, process: float) -> bool:
    """Whether calls wait that took `wall` seconds, together, in one thread.

    Not where they computed for much of it (`cpu`, seconds of their thread), nor where others had
    the processor (that is no switch that the calls have asked for: `switches`, voluntary ones).
    Where this process was busy meanwhile (`process`, its seconds of processor time), they do only
    if that does not explain it by far.
    """
    if not (wall > SLOW_CALL * calls > 0 and cpu < wall / 2 and 2 * switches >= calls):
        return False
    return process < BUSY * wall or wall > BY_FAR * calls * without_waiting(cpu / calls)


def without_waiting(cpu: float) -> float:
    """Seconds that a call takes now which computes for `cpu` seconds and never waits.

    It computes without the interpreter, where that is long enough to give it up.
    """
    work = _BLOCK[: int(cpu * BYTES_PER_SECOND)]
    begun = perf_counter()
    for _ in range(TIMES):
        if len(work) < LEAST:
            sleep(0)
        else:
            crc32(work)
    return (perf_counter() - begun) / TIMES


class Evidence:
    """Of whether one connection's calls wait, gathered over several batches of them."""

    def __init__(self) -> None:
        self._trusted = 0.0
        self._forget()

    def wanted(self) -> bool:
        """Whether to gather it: not soon after calls were found not to wait, as it takes time."""
        return perf_counter() >= self._trusted

    def _forget(self) -> None:
        self._batches = self._calls = 0
        self._sums = [0.0, 0.0, 0.0, 0.0]

    def end(self, calls: int, wall: float, begun: tuple[float, float, float]) -> bool:
        """A batch has ended, after `wall` seconds in its calls; whether such calls wait.

        `begun` is what `usage` has returned before it, in the same thread.
        """
        costs = [after - before for before, after in zip(begun, usage(), strict=True)]
        self._sums = [old + new for old, new in zip(self._sums, [wall, *costs], strict=True)]
        self._calls += calls
        self._batches += 1
        if self._batches < 2 or self._sums[0] < EVIDENCE:
            return False
        waits = wait(self._calls, *self._sums)
        self._forget()
        if not waits:
            self._trusted = perf_counter() + TRUST
        return waits


def usage() -> tuple[float, float, float]:
    """This thread's seconds of processor time, its switches, and the process's seconds.

    A switch: it gave up the processor to wait for something.
    """
    from resource import RUSAGE_THREAD, getrusage

    return thread_time(), getrusage(RUSAGE_THREAD).ru_nvcsw, process_time()


def usage_of(thread: int) -> tuple[float, float, float]:
    """As `usage`, of another thread, by its number.

    Zeros for the thread where that is not known (proc(5), "status" and "schedstat").
    """
    voluntary = 0
    try:
        with open(f"/proc/self/task/{thread}/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("voluntary_ctxt_switches:"):
                    voluntary = int(line.split()[1])
        with open(f"/proc/self/task/{thread}/schedstat", encoding="ascii") as schedstat:
            return int(schedstat.read().split()[0]) / 1e9, voluntary, process_time()
    except (OSError, ValueError, IndexError):
        return 0.0, 0, process_time()  # it has ended, or this is no Linux


def quick(seconds: float, cpu: float) -> bool:
    """Whether calls of so many seconds each, made in several threads, would better be made in one.

    Such threads hold each other up. So calls of more than QUICK_CALL, `cpu` seconds of it
    computing, are compared with some that surely do not wait.
    """
    return seconds < QUICK_CALL or seconds < QUICK_CALL + without_waiting(cpu)
