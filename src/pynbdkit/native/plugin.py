"""A plugin that is a shared object: its life's steps, as calls of its structure's functions.

What fails in C returns a number and has said why by nbdkit_error, which is in the log by then. So
a step that fails raises an error that names the plugin and the step, and no more.
"""

from __future__ import annotations

import ctypes
import os
import threading

from .. import log
from .. import session as sessions
from ..errors import ConfigError, LoadError, OpenError
from ..flags import ThreadModel
from ..plugin import Plugin
from . import library
from .device import MAX_STRING, device_class
from .elf import needed
from .structure import CALLBACKS, Structure, read

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any, Final

    from ..device import Device
    from ..session import Session
    from .device import NativeDevice

REQUIRED: Final = ("open", "get_size", "pread")
_INIT: Final = "plugin_init"


class NativePlugin(Plugin):
    """The Plugin over a shared object. `path` is the file as the user named it."""

    def __init__(self, path: str) -> None:
        """Load a file. Raises LoadError."""
        super().__init__()
        self.path = path
        self._is_loaded = False
        self._thread = 0
        self._texts: list[ctypes.c_char_p] = []
        self._library = library.load(path)
        self._file, self._structure = _open(path)
        plugin = self._structure
        self.name = _name(plugin.name, path)
        self.longname = _shown(plugin.longname)
        self.version = _shown(plugin.version)
        self.description = _shown(plugin.description)
        self.api_version = plugin.api_version
        self.max_thread_model = plugin.thread_model
        self.thread_model = plugin.thread_model
        if not 0 <= plugin.thread_model <= ThreadModel.PARALLEL:
            raise LoadError(f"{path}: thread model {plugin.thread_model} is unknown (0 to 3)")
        self._device_class = device_class(self.name, plugin, self._library)
        for required in REQUIRED:
            if not (required == "open" and plugin.open) and not self._has(required):
                raise LoadError(f"{path}: the plugin has no .{required} callback")

    def _has(self, name: str) -> bool:
        if name in vars(self._device_class):
            return True
        return name not in ("pread", "get_size") and bool(getattr(self._structure, name, None))

    def _call(self, name: str, *arguments: Any, result: Any = ctypes.c_int) -> Any:
        """Call a callback with C's arguments; None where the plugin has none."""
        function = getattr(self._structure, name)
        if not function:
            return None
        kinds = [ctypes.c_int if isinstance(a, int) else type(a) for a in arguments]
        return ctypes.CFUNCTYPE(result, *kinds)(function)(*arguments)

    def _step(self, name: str, *arguments: Any) -> int | None:
        """Call a callback that says by -1 that it failed. Raises ConfigError."""
        answer: int | None = self._call(name, *arguments)
        if answer is not None and answer < 0:
            raise ConfigError(f"{self.name}: {name.removesuffix('_function')} failed")
        return answer

    # -- the life --------------------------------------------------------------------------------

    def load(self) -> None:
        """Set the debug flags that are for it, and call its load, once."""
        if self._is_loaded:
            return
        self._is_loaded = True
        self._thread = threading.get_ident()
        self._library.follow_log()
        for flag, value in log.flags.items():
            layer, _, name = flag.partition(".")
            if layer == self.name:
                self._set_debug_flag(name, value)
        self._call("load", result=None)

    def _set_debug_flag(self, name: str, value: int) -> None:
        """Set a global variable, as nbdkit-plugin(3), "Debug Flags", has it."""
        symbol = f"{self.name}_debug_{name.replace('.', '_')}"
        try:
            ctypes.c_int.in_dll(self._file, symbol).value = value
        except ValueError:
            log.warning(f"-D {self.name}.{name} is not used: {self.path} has no {symbol}")

    def unload(self) -> None:
        """Call its unload; the file stays mapped, for its threads may still run.

        In a program the server may end in another thread than it began in. The interpreters of
        languages cannot, and their plugins are those that take one request at a time: there it
        is left to the end of the process.
        """
        alone = self.max_thread_model <= ThreadModel.SERIALIZE_ALL_REQUESTS
        if alone and self._thread != threading.get_ident():
            log.debug(f"{self.name}: not unloaded: this is not the thread that has loaded it")
            return
        self._call("unload", result=None)

    def config(self, key: str, value: str) -> None:
        """One key=value. Raises ConfigError.

        The plugin is loaded by then: languages have no interpreter before that. In a program
        parameters may be given earlier than a server does it.
        """
        self.load()
        if not self._structure.config:
            raise ConfigError(f"{self.name} takes no parameters: {key}={value}")
        words = (ctypes.c_char_p(os.fsencode(key)), ctypes.c_char_p(os.fsencode(value)))
        self._texts += words  # "valid for the lifetime of the plugin", says nbdkit-plugin(3)
        if int(self._call("config", *words)) < 0:
            raise ConfigError(f"{self.name} does not take {key}={value}")

    def magic_config_key(self) -> str:
        """What a value without a key is for."""
        return _shown(self._structure.magic_config_key)

    def config_help(self) -> str:
        """Its text for --help."""
        return _shown(self._structure.config_help).rstrip("\n")

    def config_complete(self) -> None:
        """Its own check of the parameters; then it may narrow its thread model."""
        self._step("config_complete")
        self.ask_thread_model()

    def ask_thread_model(self) -> None:
        """Let the plugin narrow its thread model. Raises ConfigError."""
        model = self._step("thread_model_function")
        if model is not None:
            if not 0 <= model <= ThreadModel.PARALLEL:
                raise ConfigError(f"{self.name}: thread_model is {model}, not 0 to 3")
            self.thread_model = min(model, self.max_thread_model)

    def get_ready(self) -> None:
        """The last step before the server may go into the background."""
        self._step("get_ready")

    def after_fork(self) -> None:
        """The first step in the process that serves."""
        self._step("after_fork")

    def cleanup(self) -> None:
        """The server stops."""
        self._call("cleanup", result=None)

    # -- for --dump-plugin -----------------------------------------------------------------------

    @property
    def struct_size(self) -> int:
        """The bytes of its structure."""
        return int(self._structure.struct_size)

    @property
    def errno_is_preserved(self) -> int:
        """Whether errno says what went wrong."""
        return int(self._structure.errno_is_preserved)

    def callbacks(self) -> list[str]:
        """What it has, in the order of the structure; two of its texts count as well."""
        old = self.api_version < 2
        found = [name for name in ("longname", "config_help") if getattr(self._structure, name)]
        for name in CALLBACKS:
            other = name.endswith("_1") is not old and name.removesuffix("_1") in _VERSIONED
            if getattr(self._structure, name) and not other:
                found.append(name.removesuffix("_1").removesuffix("_function"))
        return found

    def dump_plugin(self) -> Iterable[tuple[str, str]]:
        """What it prints by itself: on stdout, so it is caught there."""
        if not self._structure.dump_plugin:
            return
        for line in _printed_by(lambda: self._call("dump_plugin", result=None)):
            key, _, value = line.partition("=")
            yield key, value

    # -- clients ---------------------------------------------------------------------------------

    def preconnect(self, readonly: bool) -> None:
        """Ask whether it wants this client. Raises OpenError."""
        answer = self._call("preconnect", int(readonly))
        if answer is not None and answer < 0:
            raise OpenError(f"{self.name} refuses this client")

    def list_exports(self, readonly: bool, is_tls: bool) -> Iterable[str | tuple[str, str]]:
        """Its exports. Raises OpenError."""
        if not self._structure.list_exports:
            return self._default_export(readonly, is_tls)
        calls = self._library
        found = calls.nbdkit_exports_new()
        if not found:
            raise MemoryError
        try:
            answer = self._call("list_exports", int(readonly), int(is_tls), ctypes.c_void_p(found))
            if answer < 0:
                raise OpenError(f"{self.name}: list_exports failed")
            number, address = calls.nbdkit_exports_count(found), calls.pynbdkit_exports_list(found)
            entries = (_Export * number).from_address(address) if number else ()
            listed: list[str | tuple[str, str]] = []
            for entry in entries:
                if entry.name is None:
                    listed += self._default_export(readonly, is_tls)
                else:
                    listed.append((_export_name(entry.name, self.name), _shown(entry.description)))
            return listed
        finally:
            calls.nbdkit_exports_free(found)

    def _default_export(self, readonly: bool, is_tls: bool) -> list[str]:
        """The default export's name for a list; none where the plugin has no default."""
        try:
            return [self.default_export(readonly, is_tls)]
        except OpenError as error:
            log.debug(str(error))
            return []

    def default_export(self, readonly: bool, is_tls: bool) -> str:
        """What "" stands for. Raises OpenError."""
        if not self._structure.default_export:
            return ""
        name = self._call("default_export", int(readonly), int(is_tls), result=ctypes.c_char_p)
        if name is None:
            raise OpenError(f"{self.name} has no default export")
        if len(name) > MAX_STRING:
            raise OpenError(
                f"{self.name}: default_export returned {len(name)} bytes, over {MAX_STRING}"
            )
        return _export_name(name, self.name)

    def open(self, session: Session) -> Device:
        """A handle for a connection. Raises OSError."""
        before = sessions.current()
        sessions.set_current(session)  # which a filter may have given another export name
        try:
            handle = self._library.pynbdkit_open(self._structure.open, int(session.readonly))
        finally:
            sessions.set_current(before)
        if not handle:
            number = self._library.error_of_call(self.errno_is_preserved)
            why = f": {os.strerror(number)}" if number else ""
            raise OpenError(f"{self.name}: open failed{why}")
        made: NativeDevice = self._device_class(handle)
        return made


_VERSIONED: Final = frozenset(("pread", "pwrite", "flush", "trim", "zero"))
_loaded: set[object] = set()
"""The files that were loaded before, by path and by inode."""
_lock = threading.Lock()


class _Export(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("description", ctypes.c_char_p)]


def _open(path: str) -> tuple[ctypes.CDLL, Structure]:
    """Load a shared object, and ask it for its structure. Raises LoadError."""
    try:
        with _lock:
            loaded = _load(os.path.abspath(path))
    except OSError as error:
        raise LoadError(f"cannot load '{path}': {error.strerror or error}") from None
    try:
        init = getattr(loaded, _INIT)
    except AttributeError:
        raise LoadError(
            f"{path}: not a plugin: it has no function {_INIT}"
            " (is NBDKIT_REGISTER_PLUGIN used? Filters in C are not supported)"
        ) from None
    init.restype, init.argtypes = ctypes.c_void_p, []
    address = init()
    if not address:
        raise LoadError(f"{path}: the plugin's registration failed ({_INIT} returned NULL)")
    return loaded, read(address, path)


def _load(path: str) -> ctypes.CDLL:
    """Load a file so that it has variables of its own. Raises OSError.

    The dynamic loader knows files by name and inode: what it has loaded before, it hands out again,
    with the variables as they are by now. Every plugin keeps its parameters in them, so a second
    plugin of one process that is the same file is loaded from a copy.
    """
    mode = os.RTLD_NOW | os.RTLD_LOCAL
    libraries = needed(path)
    if any(name.startswith("libpython") for name in libraries):
        # Its own symbols first: this process has a Python, which is not the plugin's. Not so for
        # others: what replaces malloc, say, for the whole process has to reach the plugin, too.
        mode |= getattr(os, "RTLD_DEEPBIND", 0)
    about = os.stat(path)
    keys = {os.path.realpath(path), (about.st_dev, about.st_ino)}
    if not keys & _loaded:
        loaded = _dlopen(path, mode)
        _loaded.update(keys)
        if not mode & getattr(os, "RTLD_DEEPBIND", 0):
            _open_to_all(libraries)
        return loaded
    import tempfile

    name = os.path.basename(path)
    copy = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        with open(path, "rb") as file:
            while os.sendfile(copy, file.fileno(), None, 1 << 30):
                pass
        # By a name that was never used: a descriptor's number may come again.
        with tempfile.TemporaryDirectory(prefix="pynbdkit") as folder:
            link = os.path.join(folder, name)
            os.symlink(f"/proc/self/fd/{copy}", link)
            return _dlopen(link, mode)
    finally:
        os.close(copy)


def _dlopen(path: str, mode: int) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(path, mode=mode)
    except OSError as error:
        raise OSError(str(error).removeprefix(f"{path}: ")) from None


def _open_to_all(libraries: list[str]) -> None:
    """Let everything that is loaded from now on see the symbols of a plugin's libraries.

    A language's own modules expect it: those of Perl are not linked with libperl. The plugin's own
    symbols remain its own.
    """
    for name in libraries:
        try:
            ctypes.CDLL(name, mode=os.RTLD_NOW | os.RTLD_NOLOAD | os.RTLD_GLOBAL)
        except OSError:  # found by the plugin's own path: nobody else will need it
            pass


def _export_name(name: bytes, where: str) -> str:
    """An export's name, which is UTF-8 in the protocol. Raises OpenError."""
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise OpenError(f"{where}: the export name {name!r} is not UTF-8") from None


def _name(name: bytes | None, path: str) -> str:
    """A plugin's own name, checked as nbdkit-plugin(3) has it. Raises LoadError."""
    if not name:
        raise LoadError(f"{path}: the plugin has no name (.name is missing)")
    text = name.decode(errors="replace")
    if not (text[0].isalnum() and all(c.isascii() and (c.isalnum() or c in "-._") for c in text)):
        raise LoadError(
            f"{path}: the plugin's name is {text!r}: letters, digits and dashes may be in it"
        )
    return text


def _shown(text: bytes | None) -> str:
    return "" if text is None else text.decode(errors="replace")


def _printed_by(call: Any) -> list[str]:
    """The lines that C code prints on stdout."""
    import sys
    import tempfile

    libc = ctypes.CDLL(None)
    if sys.stdout is not None:
        sys.stdout.flush()
    libc.fflush(None)
    with tempfile.TemporaryFile() as file:
        before = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            call()
            libc.fflush(None)
        finally:
            os.dup2(before, 1)
            os.close(before)
        file.seek(0)
        return [line.decode(errors="replace") for line in file.read().splitlines()]
