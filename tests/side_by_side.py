"""What a client can find out about an export, as plain values that two servers can be compared by.

The client is libnbd. What it is told, what it reads, and what becomes of a fixed series of writes:
errors are values too.
"""

from __future__ import annotations

import hashlib
import random
from types import ModuleType
from typing import Any

QUESTIONS = (
    "is_read_only",
    "can_cache",
    "can_fast_zero",
    "can_flush",
    "can_fua",
    "can_multi_conn",
    "can_trim",
    "can_zero",
    "is_rotational",
)
MOST = 32 << 20
"""No more than so many bytes are read."""
CONTEXT = "base:allocation"


def exports(nbd: ModuleType, uri: str) -> list[tuple[str, str]]:
    """Names and descriptions, as listed."""
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_uri(uri)
    found: list[tuple[str, str]] = []

    def one(name: str, description: str) -> int:
        found.append((name, description))
        return 0

    try:
        handle.opt_list(one)
    finally:
        handle.opt_abort()
    return found


def connect(nbd: ModuleType, uri: str) -> Any:
    """A client that asks for whatever it likes. Raises nbd.Error."""
    handle = nbd.NBD()
    handle.add_meta_context(CONTEXT)
    handle.set_full_info(True)
    handle.set_strict_mode(0)
    handle.connect_uri(uri)
    return handle


def facts(nbd: ModuleType, handle: Any, *, same_content: bool = True) -> dict[str, Any]:
    """What a client sees of an export before it changes anything."""
    found: dict[str, Any] = {"size": handle.get_size()}
    for question in QUESTIONS:
        found[question] = getattr(handle, question)()
    kinds = (nbd.SIZE_MINIMUM, nbd.SIZE_PREFERRED, nbd.SIZE_MAXIMUM)
    found["block_size"] = [handle.get_block_size(kind) for kind in kinds]
    found["description"] = _said(nbd, handle.get_export_description)
    found["canonical name"] = _said(nbd, handle.get_canonical_export_name)
    found.update(_state(nbd, handle, same_content))
    return found


def changes(
    nbd: ModuleType, handle: Any, seed: int, *, same_content: bool = True, fast: bool = True
) -> list[tuple[str, Any]]:
    """The outcome of a series of requests that change an export, and what it is like then.

    `fast`: whether fast zeros are among them. None is longer than the export's maximum block size,
    or reaches over its end but for the last ones.
    """
    size = handle.get_size()
    rng = random.Random(seed)
    outcomes: list[tuple[str, Any]] = []

    def do(name: str, *arguments: Any) -> None:
        shown = [len(a) if isinstance(a, bytes) else a for a in arguments]
        outcomes.append((f"{name}{shown}", _said(nbd, getattr(handle, name), *arguments)))

    flags = [0]
    if handle.can_fua():
        flags.append(nbd.CMD_FLAG_FUA)
    block = max(handle.get_block_size(nbd.SIZE_MINIMUM), 1)
    last = max(size - 4096, 0)
    places = [(0, 4096), (8192, 512), (last, min(4096, size)), (4096, 12288), (512, 1024)]
    if block == 1:
        places += [(511, 2), (8191, 3), (3, 70000)]
    most = handle.get_block_size(nbd.SIZE_MAXIMUM) or size
    places = [(at, count) for at, count in places if count <= most and at + count <= size]
    for flag in flags:
        for offset, count in places:
            do("pwrite", rng.randbytes(count), offset, flag)
        for offset, count in places:
            do("zero", count, offset, flag)
            do("pwrite", rng.randbytes(count), offset, flag)
            do("zero", count, offset, flag | nbd.CMD_FLAG_NO_HOLE)
    for offset, count in places:
        do("pwrite", rng.randbytes(count), offset, 0)
        do("trim", count, offset, 0)
    outcomes += sorted(_state(nbd, handle, same_content).items())
    for offset, count in places:
        if fast:
            do("zero", count, offset, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE)
        do("cache", count, offset, 0)
    do("flush", 0)
    do("pwrite", bytes(512), size, 0)
    do("pread", 512, size, 0)
    do("zero", 512, size, 0)
    do("trim", 512, size, 0)
    do("flush", 0)
    outcomes += sorted(_state(nbd, handle, same_content).items())
    return outcomes


def end(nbd: ModuleType, handle: Any) -> None:
    """Disconnect, whatever became of the connection."""
    try:
        handle.shutdown()
    except nbd.Error:  # the server has closed the connection: that is in the outcomes
        pass


def _said(nbd: ModuleType, call: Any, *arguments: Any) -> Any:
    try:
        value = call(*arguments)
    except nbd.Error as error:
        return f"error {error.errno}"
    return value if value is None or isinstance(value, str) else len(value)


def _state(nbd: ModuleType, handle: Any, same_content: bool) -> dict[str, Any]:
    """Extents and content."""
    size = min(handle.get_size(), MOST)
    extents: list[tuple[int, int]] = []
    at = 0

    def add(context: str, offset: int, entries: list[int], error: Any) -> int:
        nonlocal at
        at = offset
        for length, kind in zip(entries[::2], entries[1::2], strict=True):
            if extents and extents[-1][1] == kind:
                extents[-1] = (extents[-1][0] + length, kind)
            else:
                extents.append((length, kind))
            at += length
        return 0

    if handle.can_meta_context(CONTEXT):
        while at < size:
            try:
                handle.block_status(size - at, at, add)
            except nbd.Error:
                extents.append((0, -1))
                break
    digest = hashlib.sha256()
    if same_content:
        most = min(handle.get_block_size(nbd.SIZE_MAXIMUM) or 1 << 18, 1 << 18)
        for offset in range(0, size, most):
            data = _bytes(nbd, handle, min(most, size - offset), offset)
            digest.update(data)
    return {"extents": extents, "content": digest.hexdigest()}


def _bytes(nbd: ModuleType, handle: Any, count: int, offset: int) -> bytes:
    try:
        return bytes(handle.pread(count, offset))
    except nbd.Error as error:
        return f"error {error.errno} at {offset}".encode()
