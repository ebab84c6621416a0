"""Declared, typed parameters of plugins and filters.

    class Disk(Plugin):
        size = parameters.size("Size of the disk", required=True, magic=True)
        slow = parameters.boolean("Answer slowly", default=False)

From the declaration come parsing, `--help`, `--dump-plugin`, the magic positional parameter and the
error for a wrong or missing one. An attribute `read_only` is the parameter `read-only`, unless
`key` says otherwise. Reading the attribute gives the value (the default until it is set).
"""

from __future__ import annotations

from .errors import ConfigError
from .parse import (
    parse_bool,
    parse_delay,
    parse_int,
    parse_probability,
    parse_size,
    read_password,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any


class Parameter:
    """One declared parameter; made by the functions below, read as an attribute of its owner."""

    __slots__ = (
        "choices",
        "default",
        "help",
        "key",
        "kind",
        "magic",
        "metavar",
        "multiple",
        "name",
        "parse",
        "required",
        "sets",
    )

    def __init__(
        self,
        kind: str,
        help: str,
        parse: Callable[[str, str], object],
        *,
        key: str = "",
        default: object = None,
        required: bool = False,
        magic: bool = False,
        multiple: bool = False,
        metavar: str = "",
        choices: Sequence[str] = (),
        sets: Sequence[str] = (),
    ) -> None:
        """`sets`: attributes of the same owner that get the value too (one key for several)."""
        self.kind = kind
        self.help = help
        self.parse = parse
        self.key = key
        self.name = ""
        self.default = default
        self.required = required
        self.magic = magic
        self.multiple = multiple
        self.metavar = metavar or kind.upper()
        self.choices = tuple(choices)
        self.sets = tuple(sets)

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name
        self.key = self.key or name.replace("_", "-")

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        if instance is None:
            return self
        try:
            return instance.__dict__[self.name]
        except KeyError:
            if self.multiple:
                return instance.__dict__.setdefault(self.name, list(self.default or ()))  # type: ignore[call-overload]
            return self.default

    def __set__(self, instance: object, value: object) -> None:
        instance.__dict__[self.name] = value
        for name in self.sets:
            setattr(instance, name, value)

    def take(self, instance: object, text: str) -> None:
        """Parse a text from the command line and set it; raises ConfigError that names the key."""
        try:
            value = self.parse(self.key, text)
        except ValueError as error:
            message = str(error)
            if self.key not in message:
                message = f"{self.key}: {message}"
            raise ConfigError(message) from None
        if self.multiple:
            self.__get__(instance).append(value)
        else:
            self.__set__(instance, value)

    def is_set(self, instance: object) -> bool:
        """Whether the parameter was given."""
        if self.multiple:
            return bool(instance.__dict__.get(self.name))  # reading it has put a list there
        return self.name in instance.__dict__


def size(help: str, **options: Any) -> Any:
    """A size in bytes ("100M").

    Options of all: key, default, required, magic, multiple, metavar, sets.
    """
    return Parameter("size", help, lambda _key, text: parse_size(text), **options)


def integer(help: str, *, low: int = -(1 << 63), high: int = (1 << 63) - 1, **options: Any) -> Any:
    """An integer (decimal, 0x… or 0…) from `low` to `high`."""
    return Parameter("integer", help, lambda key, text: parse_int(key, text, low, high), **options)


def boolean(help: str, **options: Any) -> Any:
    """A boolean (true, false, yes, no, on, off, 1, 0)."""
    options.setdefault("metavar", "true|false")
    return Parameter("boolean", help, lambda _key, text: parse_bool(text), **options)


def text(help: str, **options: Any) -> Any:
    """Any text."""
    return Parameter("text", help, lambda _key, text: text, **options)


def path(help: str, **options: Any) -> Any:
    """A path, made absolute at once, because a server in the background changes to "/"."""
    import os

    def parse(_key: str, text: str) -> str:
        if not text:
            raise ValueError("the path is empty")
        return os.path.abspath(text)

    return Parameter("path", help, parse, **options)


def enum(help: str, choices: Sequence[str], **options: Any) -> Any:
    """One of several words."""

    def parse(key: str, value: str) -> str:
        if value not in choices:
            raise ValueError(f"unknown {key} {value!r} (one of: {', '.join(choices)})")
        return value

    options.setdefault("metavar", "|".join(choices))
    return Parameter("enum", help, parse, choices=choices, **options)


def password(help: str, **options: Any) -> Any:
    """A password: itself, "-" (asked), "+FILE" or "-FD"."""
    return Parameter("password", help, lambda _key, text: read_password(text), **options)


def probability(help: str, **options: Any) -> Any:
    """A probability ("10%", "1:1000", "0.1")."""
    return Parameter("probability", help, parse_probability, **options)


def delay(help: str, **options: Any) -> Any:
    """A time in seconds ("3", "100ms")."""
    return Parameter("delay", help, parse_delay, **options)


class Configurable:
    """What Plugin and Filter share: a name, texts for --help, declared parameters."""

    name: str = ""
    """The name on the command line; the module's name where the class does not say."""
    version: str = ""
    longname: str = ""
    description: str = ""
    """Shown by --help; the class docstring's first line where the class does not say."""

    _declared: dict[str, Parameter] = {}

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        declared: dict[str, Parameter] = {}
        for base in reversed(cls.__mro__):
            for value in vars(base).values():
                if isinstance(value, Parameter):
                    declared[value.key] = value
        cls._declared = declared

    def __init__(self, **values: object) -> None:
        """Parameters by attribute name: a text is parsed as on the command line, all else taken."""
        by_name = {parameter.name: parameter for parameter in self._declared.values()}
        for name, value in values.items():
            parameter = by_name.get(name)
            if parameter is None:
                known = ", ".join(sorted(by_name)) or "none"
                raise ConfigError(
                    f"{type(self).__name__}: unknown parameter {name!r} (has: {known})"
                )
            if isinstance(value, str):
                parameter.take(self, value)
            else:
                parameter.__set__(self, value)

    def take_parameter(self, key: str, value: str) -> bool:
        """Set a declared parameter from the command line; False where none has this key.

        A key is matched as declared; "_" and "-" are the same. Raises ConfigError for a bad value.
        """
        parameter = self._declared.get(key) or self._declared.get(key.replace("_", "-"))
        if parameter is None:
            return False
        parameter.take(self, value)
        return True

    def check_parameters(self) -> None:
        """Raise ConfigError for a required parameter that is missing (before config_complete)."""
        for parameter in self._declared.values():
            if parameter.required and not parameter.is_set(self):
                raise ConfigError(
                    f"you must specify {parameter.key}=<{parameter.metavar}> on the command line"
                )

    def magic_config_key(self) -> str:
        """The parameter that a value without "key=" is for; "" where there is none."""
        for parameter in self._declared.values():
            if parameter.magic:
                return parameter.key
        return ""

    def config_help(self) -> str:
        """One line a parameter, for --help."""
        lines = []
        for parameter in self._declared.values():
            left = f"{parameter.key}=<{parameter.metavar}>"
            marks = []
            if parameter.required:
                marks.append("required")
            if parameter.magic:
                marks.append("may be given without its key")
            if parameter.default is not None and not parameter.multiple:
                marks.append(f"default {_shown(parameter.default)}")
            right = parameter.help + (f" ({', '.join(marks)})" if marks else "")
            lines.append(f"{left:<24} {right}")
        return "\n".join(lines)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)
