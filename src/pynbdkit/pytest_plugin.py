"""Fixtures for everybody's tests: `nbd_disk` gives a test a disk, over a real socket.

    def test_my_client(nbd_disk):
        disk = nbd_disk(size="1M")                       # a RAM disk
        disk = nbd_disk("file", file="disk.img")         # any plugin
        disk = nbd_disk(MyPlugin(), filters=["log"])     # your own
        subprocess.run(["qemu-img", "info", disk.uri], check=True)

Installed with the package (entry point `pytest11`); every disk is stopped when the test ends.
"""

from __future__ import annotations

import pytest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from .device import Device
    from .embed import RunningServer
    from .filter import Filter
    from .plugin import Plugin


class Disks:
    """Makes running servers for one test."""

    def __init__(self) -> None:
        self._running: list[RunningServer] = []

    def __call__(
        self,
        source: str | Plugin | Device | Callable[[], Device] = "memory",
        *,
        filters: Sequence[Filter | str] = (),
        readonly: bool = False,
        **parameters: object,
    ) -> RunningServer:
        """Serve a disk: a plugin by name (with its parameters), or anything `serve` takes.

        A name without a size is a RAM disk of 1 MiB. Returns a RunningServer (`uri`, `socket`).
        """
        from .embed import load_plugin, serve

        if isinstance(source, str):
            if source == "memory":
                parameters.setdefault("size", "1M")
            source = load_plugin(source, **parameters)
            parameters = {}
        texts = {key: str(value) for key, value in parameters.items()}
        server = serve(source, filters=filters, readonly=readonly, parameters=texts)
        self._running.append(server)
        return server

    def stop(self) -> None:
        """Stop all of them."""
        while self._running:
            self._running.pop().stop()


@pytest.fixture
def nbd_disk() -> Iterator[Disks]:
    """A function that serves disks to this test; see `Disks`."""
    disks = Disks()
    yield disks
    disks.stop()
