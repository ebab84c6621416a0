"""Scripts as plugins: loading a file, the steps of the life, how an author's mistakes look."""

from __future__ import annotations

import errno
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pynbdkit import log
from pynbdkit.adapters.script import load_module
from pynbdkit.chain import Chain
from pynbdkit.errors import ConfigError, LoadError, OpenError, PynbdkitError
from pynbdkit.flags import ThreadModel
from pynbdkit.loader import load_filter, load_plugin
from pynbdkit.session import Session

V2 = """
import errno, nbdkit
API_VERSION = 2
def open(readonly): return "handle"
def get_size(h): return 1048576
def pread(h, buf, offset, flags): buf[:] = b"x" * len(buf)
"""
V1 = """
import errno, nbdkit
def open(readonly): return "handle"
def get_size(h): return 1048576
def pread(h, count, offset): return b"x" * count
"""

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a script and returns its name, which is relative to the working directory."""
    monkeypatch.chdir(tmp_path)

    def make(*parts: str, name: str = "disk.py") -> str:
        Path(name).write_text("\n".join(parts))
        return name

    return make


@pytest.fixture(autouse=True)
def _no_leftovers() -> Iterator[None]:
    before = set(sys.modules)
    main = sys.modules["__main__"]
    yield
    assert sys.modules["__main__"] is main
    for name in set(sys.modules) - before:
        if name.startswith("pynbdkit_file_"):
            del sys.modules[name]


# -- loading a file --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\nif True print(x)", "disk.py:2: SyntaxError: "),
        ("def f():\nreturn 1", "disk.py:2: IndentationError: "),
        ("import there_is_no_such_module", "disk.py:1: ModuleNotFoundError: No module named"),
        ("from os import nothing_of_the_kind", "disk.py:1: ImportError: cannot import name"),
        ("a = 1\n\n1 / 0", "disk.py:3: ZeroDivisionError: division by zero"),
        ("def f():\n    raise ValueError('no')\nf()", "disk.py:2: ValueError: no"),
        ("import json\njson.loads('{')", "disk.py:2: JSONDecodeError: "),
        ("import sys\nsys.exit(3)", "disk.py:2: SystemExit: 3"),
        ("x = '\0'", "disk.py"),
    ],
)
def test_a_file_that_cannot_run_is_one_line(write: Write, text: str, message: str) -> None:
    with pytest.raises(LoadError) as caught:
        load_module(write(text))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_not_text(write: Write) -> None:
    with pytest.raises(LoadError, match=r"cannot open 'none.py': No such file"):
        load_module("none.py")
    Path("bytes.py").write_bytes(b"x = '\xff\xfe'\n")
    with pytest.raises(LoadError, match=r"^bytes\.py"):
        load_module("bytes.py")


def test_verbose_adds_the_traceback(
    write: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "verbose", True)
    with pytest.raises(LoadError):
        load_module(write("def broken():\n    return 1 / 0\nbroken()"))
    shown = capsys.readouterr().err
    assert "return 1 / 0" in shown
    assert "in broken" in shown


def test_a_script_is_called_main_and_knows_its_file(write: Write) -> None:
    module = load_module(write(V2, "name, file = __name__, __file__"))
    assert module.name == "__main__"
    assert module.file == str(Path("disk.py").resolve())


def test_two_loads_of_one_file_are_two_scripts(write: Write) -> None:
    path = write(V2, "state = []")
    first, second = load_module(path), load_module(path)
    assert first.state is not second.state


NATIVE = """
from __future__ import annotations
from dataclasses import dataclass
import pynbdkit

@dataclass
class State:
    size: int

class Disk(pynbdkit.Plugin):
    def open(self, session): return pynbdkit.Device()

main = False
if __name__ == "__main__":
    main = True
"""


def test_a_native_file_is_a_module_of_its_own(write: Write) -> None:
    first = load_module(write(NATIVE))
    second = load_module(write(NATIVE))
    assert first.__name__ != second.__name__
    assert not first.main
    state = first.State(5)
    assert pickle.loads(pickle.dumps(state)) == state
    assert load_plugin("./disk.py").name == "disk"


def test_a_native_file_that_fails_leaves_no_module(write: Write) -> None:
    before = set(sys.modules)
    with pytest.raises(LoadError):
        load_module(write("raise RuntimeError('no')"))
    assert {n for n in set(sys.modules) - before if n.startswith("pynbdkit_file")} == set()


def test_two_classes_in_one_file(write: Write) -> None:
    path = write(NATIVE, "class Other(Disk): pass\nclass Third(Disk): pass")
    with pytest.raises(LoadError, match=r"disk\.py: more than one Plugin \(Other, Third\)"):
        load_plugin(path)
    with pytest.raises(LoadError, match=r"disk\.py: defines no subclass of pynbdkit.Filter"):
        load_filter(path)


# -- API versions and required functions -----------------------------------------------------------


@pytest.mark.parametrize("value", ["0", "3", "-1", "'2'", "None", "2.5", "[2]"])
def test_unknown_version_is_refused_in_one_line(load: Any, value: str) -> None:
    with pytest.raises(LoadError) as caught:
        load(V2, f"API_VERSION = {value}")
    message = str(caught.value)
    assert message == f"disk.py: API_VERSION is {value}, but the versions supported are 1 and 2"


def test_versions(load: Any) -> None:
    assert load(V1).api_version == 1
    assert load(V1, "API_VERSION = 1").api_version == 1
    assert load(V2).api_version == 2


@pytest.mark.parametrize("name", ["open", "get_size", "pread"])
@pytest.mark.parametrize("instead", ["del {}", "{} = 5"])
def test_a_required_function_is_missing(load: Any, name: str, instead: str) -> None:
    with pytest.raises(LoadError, match=rf"^disk\.py: no function {name} \(every script has"):
        load(V2, instead.format(name))


def test_a_file_that_is_no_plugin_at_all(load: Any) -> None:
    with pytest.raises(LoadError, match=r"disk\.py: not a plugin: it defines neither"):
        load("x = 1")


@pytest.mark.parametrize(
    ("text", "form"),
    [
        (V2 + "\nAPI_VERSION = 1", r"version 1, pread\(h, count, offset\): is 'API_VERSION = 2'"),
        (V1 + "\nAPI_VERSION = 2", r"version 2, pread\(h, buf, offset, flags\): is it one of"),
    ],
)
def test_pread_of_the_other_version(load: Any, text: str, form: str) -> None:
    with pytest.raises(LoadError, match=form):
        load(text)


@pytest.mark.parametrize(
    "pread",
    [
        "def pread(*args): pass",
        "def pread(h, buf, offset, flags=0, more=None): pass",
        "import functools\npread = functools.partial(lambda a, h, b, o, f: None, 1)",
        "class Pread:\n  def __call__(self, h, b, o, f): pass\npread = Pread()",
    ],
)
def test_pread_that_can_be_called(load: Any, pread: str) -> None:
    load(V2, pread)


# -- the life --------------------------------------------------------------------------------------

LIFE = """
calls = []
def config(key, value): calls.append(("config", key, value))
def config_complete(): calls.append("config_complete")
def thread_model():
    calls.append("thread_model")
    return nbdkit.THREAD_MODEL_PARALLEL
def get_ready(): calls.append("get_ready")
def after_fork(): calls.append("after_fork")
def preconnect(readonly): calls.append(("preconnect", readonly))
def list_exports(readonly, is_tls):
    calls.append(("list_exports", readonly, is_tls))
    yield "a"
    yield ("b", "the second")
def default_export(readonly, is_tls):
    calls.append(("default_export", readonly, is_tls))
    return "a"
def open(readonly):
    calls.append(("open", readonly))
    return "handle"
def close(h): calls.append(("close", h))
def cleanup(): calls.append("cleanup")
"""


def test_the_whole_life_in_order(load: Any) -> None:
    plugin = load(V2, LIFE)
    chain = Chain(plugin)
    chain.load()
    chain.config("size", "1M")
    chain.config("script", "another")
    chain.complete()
    assert chain.thread_model() == ThreadModel.PARALLEL
    chain.get_ready()
    chain.after_fork()
    chain.preconnect(False)
    assert chain.list_exports(False, True) == [("a", ""), ("b", "the second")]
    assert chain.default_export(True, False) == "a"
    layer = chain.open(Session(readonly=True))
    layer.close()
    assert chain.cleanup() == []
    assert chain.unload() == []
    assert plugin._names["calls"] == [
        ("config", "size", "1M"),
        ("config", "script", "another"),
        "config_complete",
        "thread_model",
        "get_ready",
        "after_fork",
        ("preconnect", False),
        ("list_exports", False, True),
        ("default_export", True, False),
        ("open", True),
        ("close", "handle"),
        "cleanup",
    ]


def test_what_a_script_need_not_have(load: Any) -> None:
    chain = Chain(load(V1))
    chain.load()
    chain.complete()
    assert chain.thread_model() == ThreadModel.SERIALIZE_ALL_REQUESTS
    chain.get_ready()
    chain.after_fork()
    chain.preconnect(True)
    assert chain.list_exports(False, False) == [("", "")]
    assert chain.default_export(False, False) == ""
    layer = chain.open(Session())
    assert layer.get_size() == 1 << 20
    layer.close()
    assert chain.cleanup() == []


def test_parameters_for_a_script_that_takes_none(load: Any) -> None:
    with pytest.raises(ConfigError, match=r"disk\.py: parameter 'size': this script takes none"):
        load(V1).config("size", "1M")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise RuntimeError('no such ' + key)", "parameter 'size': no such size"),
        ("nbdkit.parse_size(value)", "parameter 'size': could not parse size: 'big'"),
        ("nothing()", "parameter 'size': NameError: name 'nothing' is not defined"),
        ("raise OSError(2, 'gone', 'f')", "parameter 'size': gone: f"),
        ("raise SystemExit(4)", "parameter 'size': SystemExit: 4"),
        ("raise RuntimeError", "parameter 'size': RuntimeError"),
    ],
)
def test_a_parameter_that_the_script_refuses(load: Any, body: str, message: str) -> None:
    plugin = load(V1, f"def config(key, value):\n    {body}")
    line = (V1 + "\n").count("\n") + 2
    with pytest.raises(ConfigError) as caught:
        plugin.config("size", "big")
    assert str(caught.value).startswith(f"disk.py:{line}: {message}")


@pytest.mark.parametrize("step", ["config_complete", "get_ready", "after_fork", "cleanup"])
def test_a_step_that_fails_is_one_line(load: Any, step: str) -> None:
    plugin = load(V1, f"def {step}(): raise KeyError('lost')")
    with pytest.raises(PynbdkitError, match=r"^disk\.py:\d+: .*KeyError: 'lost'$"):
        getattr(plugin, step)()


@pytest.mark.parametrize("value", ["9", "-1", "'parallel'", "None", "True"])
def test_a_wrong_thread_model(load: Any, value: str) -> None:
    plugin = load(V1, f"def thread_model(): return {value}")
    with pytest.raises(PynbdkitError, match=r"disk\.py: thread_model returned .*, not one of"):
        Chain(plugin).complete()


def test_functions_may_be_replaced_until_a_client_opens(load: Any) -> None:
    plugin = load(
        V1,
        "def config_complete():\n"
        "    global pread\n"
        "    pread = lambda h, count, offset: b'y' * count",
    )
    chain = Chain(plugin)
    chain.load()
    chain.complete()
    assert chain.open(Session()).pread(3, 0, 0) == b"yyy"


# -- connections -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", ["5", "None", "'ab'", "[5]", "[('a', 5)]", "[('a',)]", "[('a', 'b', 'c')]", "[None]"]
)
def test_wrong_exports(load: Any, value: str) -> None:
    plugin = load(V1, f"def list_exports(readonly, is_tls): return {value}")
    with pytest.raises(OpenError, match=r"disk\.py: list_exports returned .*, not a list of names"):
        Chain(plugin).list_exports(False, False)


def test_no_exports_are_a_list_too(load: Any) -> None:
    plugin = load(V1, "def list_exports(readonly, is_tls): return ()")
    assert Chain(plugin).list_exports(False, False) == []


@pytest.mark.parametrize("value", ["5", "None", "b'a'"])
def test_a_wrong_default_export(load: Any, value: str) -> None:
    plugin = load(V1, f"def default_export(readonly, is_tls): return {value}")
    with pytest.raises(OpenError, match=r"disk\.py: default_export returned .*, not a text"):
        Chain(plugin).default_export(False, False)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("preconnect", lambda chain: chain.preconnect(False)),
        ("list_exports", lambda chain: chain.list_exports(False, False)),
        ("default_export", lambda chain: chain.default_export(False, False)),
        ("open", lambda chain: chain.open(Session())),
    ],
)
def test_set_error_counts_wherever_a_client_waits(load: Any, name: str, call: Any) -> None:
    chain = Chain(
        load(
            V2,
            f"def {name}(*_):\n    nbdkit.set_error(errno.EACCES)\n    raise RuntimeError('go')",
        )
    )
    with pytest.raises(PermissionError, match="RuntimeError: go") as caught:
        call(chain)
    assert caught.value.errno == errno.EACCES


def test_the_handle_goes_when_the_device_goes(load: Any) -> None:
    import weakref

    plugin = load(V2, "class Handle: pass\ndef open(readonly): return Handle()")
    device = plugin.open(Session())
    handle = weakref.ref(device.pread.__closure__[1].cell_contents)
    assert type(handle()).__name__ == "Handle"
    del device
    assert handle() is None


# -- --dump-plugin ---------------------------------------------------------------------------------


def test_callbacks_are_those_of_the_version(load: Any) -> None:
    more = "def pwrite_fua(*_): pass\ndef extents(*_): pass\ncan_write = True"
    assert load(V1, more).callbacks() == ["open", "get_size", "pread", "pwrite_fua"]
    assert load(V2, more).callbacks() == ["open", "get_size", "pread", "extents"]


def test_dump_plugin_prints(load: Any, capsys: pytest.CaptureFixture[str]) -> None:
    plugin = load(V1, "def dump_plugin(): print('colour=blue')")
    assert list(plugin.dump_plugin()) == []
    assert capsys.readouterr().out == "colour=blue\n"
    assert "dump_plugin" in plugin.callbacks()
