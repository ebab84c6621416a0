"""NamedTuple without `typing`, whose import costs a server that starts two milliseconds.

To be used as ``if TYPE_CHECKING: from typing import NamedTuple``, else from here: checkers see the
class that they know, and a class statement means the same.
"""

from __future__ import annotations

import collections

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_namedtuple: Callable[..., Any] = collections.namedtuple


class _Meta(type):
    """Makes a named tuple of a class statement's annotated names and their defaults."""

    def __new__(meta, name: str, bases: tuple[type, ...], space: dict[str, Any]) -> Any:
        if not bases:
            return super().__new__(meta, name, bases, space)
        fields = list(space.get("__annotations__", ()))
        defaults = [space.pop(field) for field in fields if field in space]
        made: Any = _namedtuple(name, fields, defaults=defaults, module=space["__module__"])
        for key, value in space.items():
            if key not in ("__module__", "__annotations__"):
                setattr(made, key, value)
        return made


class NamedTuple(metaclass=_Meta):
    """What `typing.NamedTuple` is."""
