"""Import what would be imported later, before the server becomes another user.

Our modules import much of what they need in the functions that need it, to start quickly. After
-u and -g, Python's library or the package itself may be out of reach (in root's home, say): a
server that fails only then fails at the wrong time. So everything is imported that the functions
of our loaded modules may import. What plugins of others need, they have to import by themselves.
"""

from __future__ import annotations

import sys
from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import CodeType
    from typing import Final

PACKAGE: Final = __name__.split(".")[0]
OTHERS: Final = ("linecache", "tokenize", "encodings.idna", "encodings.unicode_escape")
"""What the library itself imports late, for tracebacks and texts."""
DONE: Final = ("cli", "loader", "parse")
"""Parts of the package whose work is over: what they may import costs more than the rest."""
_IS_FUNCTION: Final = 0x01  # inspect.CO_OPTIMIZED: neither a module's code nor a class's


def preload() -> None:
    """Import it all; what cannot be imported is left for the function that wants it."""
    done: set[str] = set()
    names = set(OTHERS)
    while True:
        for name in names:
            try:
                import_module(name)
            except Exception:  # noqa: S112
                continue  # a function's business, as it always was
        ours = [name.split(".") for name in sys.modules if name.startswith(f"{PACKAGE}.")]
        loaded = {".".join(parts) for parts in ours if parts[1] not in DONE} - done
        if not loaded:
            return
        done |= loaded
        names = {name for module in loaded for name in late_imports(module)}


def late_imports(module: str) -> Iterator[str]:
    """The names of modules that the functions of a loaded module may import."""
    spec = getattr(sys.modules[module], "__spec__", None)
    get_code = getattr(spec and spec.loader, "get_code", None)
    code = get_code(module) if get_code else None
    if code is not None:
        package = module if spec and spec.submodule_search_locations else module.rpartition(".")[0]
        yield from _in_code(code, package)


def _in_code(code: CodeType, package: str) -> Iterator[str]:
    import dis
    from importlib.util import resolve_name

    if code.co_flags & _IS_FUNCTION:
        before: list[object] = [0, None]  # what was pushed: the level, and the names to import
        for instruction in dis.get_instructions(code):
            if instruction.opname == "IMPORT_NAME":
                level, wanted = before
                name = str(instruction.argval or "")
                if isinstance(level, int) and level:
                    name = resolve_name("." * level + name, package)
                yield name
                if name.startswith(PACKAGE):  # `from . import x`: x may be a module
                    yield from (f"{name}.{x}" for x in wanted or ())  # type: ignore[attr-defined]
            elif instruction.opname.startswith("LOAD_"):
                before = [before[1], instruction.argval]
    for constant in code.co_consts:
        if hasattr(constant, "co_code"):
            yield from _in_code(constant, package)
