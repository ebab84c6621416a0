"""Scripts: plugins that are a Python file of functions, as nbdkit-python-plugin(3) has them.

`load_module` runs a file; `ScriptPlugin` makes the functions that it left behind a Plugin. The
life's steps are called as they are; a connection's callbacks are adapted by `version1` or
`version2`, by the script's API_VERSION (plugin-contract.md, "API versions"). Functions are looked
up when a step comes and when a client connects, so a script may replace them until then.

What is wrong with a script is said in one line, with the file and the line that raised; --verbose
adds the traceback.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType

from .. import log
from ..device import CONFIGURATION, is_async, then
from ..errors import ConfigError, LoadError, OpenError, PynbdkitError
from ..flags import ThreadModel
from ..plugin import Plugin
from . import version1, version2
from .callbacks import calling, forget

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable
    from typing import Any

    from ..device import Device
    from ..session import Session

REQUIRED = ("open", "get_size", "pread")
LIFE = (
    "dump_plugin",
    "config",
    "config_complete",
    "thread_model",
    "get_ready",
    "after_fork",
    "cleanup",
    "preconnect",
    "list_exports",
    "default_export",
    "open",
)
VERSIONS = {1: version1, 2: version2}


def load_module(path: str) -> ModuleType:
    """Run a Python file; returns the module that it made. Raises LoadError in one line.

    A script finds itself called "__main__", as in nbdkit; any other file (a native plugin or
    filter) has a name of its own in `sys.modules`, so that its `if __name__ == "__main__"` stays
    out, and so that dataclasses and pickle find its classes.
    """
    file = os.path.abspath(path)
    try:
        with open(file, "rb") as stream:
            source = stream.read()
    except OSError as error:
        raise LoadError(f"cannot open '{path}': {error.strerror}") from None
    try:
        code = compile(source, file, "exec", dont_inherit=True)
    except SyntaxError as error:
        line = f":{error.lineno}" if error.lineno else ""
        raise LoadError(f"{path}{line}: {type(error).__name__}: {error.msg}") from None
    except ValueError as error:
        raise LoadError(f"{path}: not a Python file: {error}") from None

    from . import nbdkit_module

    sys.modules["nbdkit"] = nbdkit_module
    if {"get_size", "pread"} <= set(code.co_names):
        module = ModuleType("__main__")
    else:
        module = ModuleType(_free_name(file))
        sys.modules[module.__name__] = module
    module.__file__ = file
    try:
        exec(code, vars(module))  # noqa: S102 (running it is what it is there for)
    except KeyboardInterrupt:
        raise
    except BaseException as failure:
        if sys.modules.get(module.__name__) is module:
            del sys.modules[module.__name__]
        raise LoadError(_one_line(path, file, "", failure)) from None
    return module


def _free_name(file: str) -> str:
    stem = "".join(c if c.isalnum() else "_" for c in _stem(file))
    name, number = f"pynbdkit_file_{stem}", 1
    while name in sys.modules:
        number += 1
        name = f"pynbdkit_file_{stem}_{number}"
    return name


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _one_line(
    path: str, file: str, step: str, failure: BaseException, plain: tuple[type, ...] = ()
) -> str:
    """Where in `file` an exception came from, and what it says; the traceback when verbose.

    The type's name is left out for the types in `plain`.
    """
    line, frame = 0, failure.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == file:
            line = frame.tb_lineno
        frame = frame.tb_next
    if log.verbose:
        import traceback

        for text in "".join(traceback.format_exception(failure)).rstrip().splitlines():
            log.debug(text)
    what = str(failure) if type(failure) in plain and str(failure) else log.describe(failure)
    return ": ".join(filter(None, (f"{path}:{line}" if line else path, step, what)))


class ScriptPlugin(Plugin):
    """The Plugin over a script. `path` is the file as the user named it, for messages."""

    def __init__(self, path: str, module: ModuleType) -> None:
        """Raises LoadError for an unknown API_VERSION and for missing functions."""
        super().__init__()
        self.name = _stem(path)
        self.path = path
        self._file = str(module.__file__)
        self._names = vars(module)
        self._thread_model: int | None = None

        version = self._names.get("API_VERSION", 1)
        if not isinstance(version, int) or version not in VERSIONS:
            supported = " and ".join(map(str, VERSIONS))
            raise LoadError(
                f"{path}: API_VERSION is {version!r}, but the versions supported are {supported}"
            )
        self.api_version = int(version)
        self._callbacks = VERSIONS[self.api_version].CALLBACKS
        self._check_functions()

    def _check_functions(self) -> None:
        missing = [name for name in REQUIRED if self._function(name) is None]
        if len(missing) == len(REQUIRED):
            raise LoadError(
                f"{self.path}: not a plugin: it defines neither a subclass of pynbdkit.Plugin"
                " nor the functions open, get_size and pread"
            )
        self._check_async()
        if missing:
            raise LoadError(
                f"{self.path}: no function {', '.join(missing)}"
                " (every script has open, get_size and pread)"
            )
        # The version that was forgotten is the mistake that everybody makes once.
        if self.api_version == 1:
            form, way_out = "pread(h, count, offset)", "is 'API_VERSION = 2' missing?"
        else:
            form, way_out = "pread(h, buf, offset, flags)", "is it one of version 1?"
        if not _takes(self._names["pread"], form.count(",") + 1):
            raise LoadError(
                f"{self.path}: pread cannot be called as in API version {self.api_version},"
                f" {form}: {way_out}"
            )

    def _check_async(self) -> None:
        """Version 1 knows no `async def`, and what runs before the server cannot be it."""
        for name in self.callbacks():
            if is_async(self._function(name)):
                if self.api_version == 1:
                    raise LoadError(f"{self.path}: 'async def {name}' needs API_VERSION = 2")
                if name in (*CONFIGURATION, "thread_model"):
                    raise LoadError(f"{self.path}: {name} cannot be 'async def'")

    def _function(self, name: str) -> Callable[..., Any] | None:
        """The script's function of this name; something that cannot be called is not one."""
        value = self._names.get(name)
        return value if callable(value) else None

    def _step(self, name: str, *arguments: Any) -> Any:
        """Call the function for a step of the server's life, if the script has it."""
        function = self._function(name)
        if function is None:
            return None
        forget()
        if is_async(function):
            return self._async_step(function, name)
        try:
            return function(*arguments)
        except BaseException as failure:
            raise self._failed_step(failure, name, *arguments) from None

    async def _async_step(self, function: Callable[..., Any], name: str) -> None:
        try:
            await function()
        except BaseException as failure:
            raise self._failed_step(failure, name) from None

    def _failed_step(self, failure: BaseException, name: str, *arguments: Any) -> BaseException:
        """What to raise for what a step raised."""
        if isinstance(failure, KeyboardInterrupt):
            return failure
        if not name.startswith("config"):
            return PynbdkitError(_one_line(self.path, self._file, name, failure))
        # What a script says of a parameter is for the user: its text is the message.
        step = f"parameter '{arguments[0]}'" if arguments else ""
        plain = (RuntimeError, ValueError, Exception)
        return ConfigError(_one_line(self.path, self._file, step, failure, plain))

    # -- the server's life -----------------------------------------------------------------------

    def config(self, key: str, value: str) -> None:
        """Hand a parameter to the script."""
        if self._function("config") is None:
            raise ConfigError(
                f"{self.path}: parameter '{key}': this script takes none (no function config)"
            )
        self._step("config", key, value)

    def config_complete(self) -> None:
        """Call the script's function of this name."""
        self._step("config_complete")

    @property
    def thread_model(self) -> int:  # type: ignore[override]
        """What the script's thread_model returns, asked once; it is serialize_all_requests else."""
        if self._thread_model is None:
            if self._function("thread_model") is None:
                self._thread_model = ThreadModel.SERIALIZE_ALL_REQUESTS
            else:
                model = self._step("thread_model")
                if type(model) is not int or not 0 <= model <= ThreadModel.PARALLEL:
                    raise PynbdkitError(
                        f"{self.path}: thread_model returned {model!r},"
                        " not one of nbdkit.THREAD_MODEL_*"
                    )
                self._thread_model = model
        return self._thread_model

    @property
    def forkable(self) -> bool:  # type: ignore[override]
        """The script's variable of this name: whether several processes may serve its disk."""
        declared: bool = self._names.get("forkable", False)
        return declared

    def get_ready(self) -> Awaitable[None] | None:
        """Call the script's function of this name."""
        return self._step("get_ready")  # type: ignore[no-any-return]

    def after_fork(self) -> Awaitable[None] | None:
        """Call the script's function of this name."""
        return self._step("after_fork")  # type: ignore[no-any-return]

    def cleanup(self) -> Awaitable[None] | None:
        """Call the script's function of this name."""
        return self._step("cleanup")  # type: ignore[no-any-return]

    def callbacks(self) -> list[str]:
        """The callbacks that the script has and that its API version knows."""
        return [name for name in (*LIFE, *self._callbacks) if self._function(name) is not None]

    def dump_plugin(self) -> Iterable[tuple[str, str]]:
        """The script prints its own lines."""
        self._step("dump_plugin")
        return ()

    # -- connections -----------------------------------------------------------------------------

    def preconnect(self, readonly: bool) -> Awaitable[None] | None:
        """Ask the script whether it wants this client."""
        function = self._function("preconnect")
        return None if function is None else calling(function, readonly)()

    def list_exports(
        self, readonly: bool, is_tls: bool
    ) -> Iterable[str | tuple[str, str]] | Awaitable[Iterable[str | tuple[str, str]]]:
        """What the script offers; without the function: its default export."""
        function = self._function("list_exports")
        if function is None:
            return super().list_exports(readonly, is_tls)
        if is_async(function):
            return then(calling(function, readonly)(is_tls), self._exports)  # type: ignore[no-any-return]

        def exports(*arguments: bool) -> Any:
            answer = function(*arguments)
            iterable = hasattr(answer, "__iter__") and not isinstance(answer, str)
            return list(answer) if iterable else answer

        return self._exports(calling(exports, readonly)(is_tls))

    def _exports(self, answer: Any) -> list[tuple[str, str]]:
        """What list_exports returned, checked."""
        result = []
        for item in answer if isinstance(answer, list) else [None]:
            pair = (item, "") if isinstance(item, str) else item
            if not (
                isinstance(pair, tuple | list)
                and len(pair) == 2
                and isinstance(pair[0], str)
                and isinstance(pair[1], str | None)
            ):
                raise OpenError(
                    f"{self.path}: list_exports returned {answer!r:.100},"
                    " not a list of names and (name, description)"
                )
            result.append((pair[0], pair[1] or ""))
        return result

    def default_export(self, readonly: bool, is_tls: bool) -> str | Awaitable[str]:
        """The export that "" stands for."""
        function = self._function("default_export")
        if function is None:
            return super().default_export(readonly, is_tls)

        def checked(name: object) -> str:
            if not isinstance(name, str):
                raise OpenError(f"{self.path}: default_export returned {name!r}, not a text")
            return name

        return then(calling(function, readonly)(is_tls), checked)  # type: ignore[no-any-return]

    def open(self, session: Session) -> Device | Awaitable[Device]:
        """Call the script's open, and adapt its callbacks to a Device over what that returned."""
        opened = calling(self._names["open"], session.readonly)()
        return then(opened, self._device)  # type: ignore[no-any-return]

    def _device(self, handle: Any) -> Device:
        functions = {name: self._names[name] for name in self.callbacks()}
        device: Device = VERSIONS[self.api_version].device(functions, handle, self.path)
        return device


def _takes(function: Any, count: int) -> bool:
    """Whether a function can be called with `count` arguments; true where one cannot tell."""
    code = getattr(function, "__code__", None)
    if type(function).__name__ != "function" or code is None or code.co_flags & 0x04:  # *args
        return True
    defaults = len(function.__defaults__ or ())
    return bool(code.co_argcount - defaults <= count <= code.co_argcount)
