"""A transmission that no server has: its socket and its device are the test's."""

from __future__ import annotations

from typing import Any

from pynbdkit import Device, Session, ThreadModel
from pynbdkit.complete import Layer
from pynbdkit.protocol.negotiated import ExportInfo, Negotiated
from pynbdkit.server.carousel import Carousel
from pynbdkit.server.transmission import Transmission
from pynbdkit.server.watch import Watch


def bare_transmission(sock: Any, device: Device, carousel: Carousel | None = None) -> Transmission:
    """One of simple replies, for a device whose calls may meet; nothing runs it yet."""
    session = Session()
    layer = Layer(device, session, "disks")
    return Transmission(
        sock,
        layer,
        Negotiated(ExportInfo("", layer.get_size(), 0), False, True, ()),
        b"",
        session,
        name="disks",
        thread_model=ThreadModel.PARALLEL,
        threads=16,
        lock=None,
        watch=Watch(),
        carousel=carousel or Carousel(),
    )
