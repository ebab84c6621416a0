"""Our nbdkit-plugin.h: what is compiled with it, or with nbdkit's, is the same to both servers.

The facts are compared with nbdkit's header by the compiler, not by reading either.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import support
from pynbdkit import __version__
from pynbdkit.native import library
from pynbdkit.native.structure import Structure

OURS = support.ROOT / "src" / "pynbdkit" / "include"
THEIRS = Path("/usr/include")
ANSWERS = {"nbdkit_extents_", "nbdkit_exports_", "nbdkit_get_"}
"""How the functions begin that are for filters alone (nbdkit-filter(3))."""

VERSION_1 = """\
#include <stdlib.h>
#include <string.h>
#include <nbdkit-plugin.h>

#define THREAD_MODEL NBDKIT_THREAD_MODEL_SERIALIZE_ALL_REQUESTS

static char disk[65536];
static int letter = 'v';

static void ram_load (void) { memset (disk, letter, sizeof disk); }

static int ram_config (const char *key, const char *value)
{
  if (strcmp (key, "letter") == 0 && value[0] && !value[1])
    letter = value[0];
  else {
    nbdkit_error ("unknown parameter %s", key);
    return -1;
  }
  memset (disk, letter, sizeof disk);
  return 0;
}

static void *ram_open (int readonly)
{
  nbdkit_debug ("open: readonly=%d", readonly);
  return NBDKIT_HANDLE_NOT_NEEDED;
}

static int64_t ram_get_size (void *handle)
{
  (void) handle;
  return sizeof disk;
}

static int ram_flush (void *handle)
{
  (void) handle;
  return 0;
}

static int ram_pread (void *handle, void *buf, uint32_t count, uint64_t offset)
{
  (void) handle;
  if (offset == 4096) {
    nbdkit_set_error (ENOSPC);
    return -1;
  }
  memcpy (buf, disk + offset, count);
  return 0;
}

static int ram_pwrite (void *handle, const void *buf, uint32_t count, uint64_t offset)
{
  (void) handle;
  memcpy (disk + offset, buf, count);
  return 0;
}
"""
DESIGNATED_1 = """
static struct nbdkit_plugin plugin = {
  .name = "ram",
  .longname = "one letter",
  .version = "1.0",
  .load = ram_load,
  .config = ram_config,
  .config_help = "letter=<L>",
  .open = ram_open,
  .get_size = ram_get_size,
  .pread = ram_pread,
  .pwrite = ram_pwrite,
  .flush = ram_flush,
};
NBDKIT_REGISTER_PLUGIN (plugin)
"""
ASSIGNED = """
static struct nbdkit_plugin made (void)
{
  struct nbdkit_plugin it;
  memset (&it, 0, sizeof it);
  it.name = "ram";
  it.load = ram_load;
  it.config = ram_config;
  it.open = ram_open;
  it.get_size = ram_get_size;
  it.pread = ram_pread;
  it.pwrite = ram_pwrite;
  it.flush = ram_flush;
  return it;
}
static struct nbdkit_plugin plugin = made ();
NBDKIT_REGISTER_PLUGIN (plugin)
"""
VERSION_2 = "#define NBDKIT_API_VERSION 2\n" + re.sub(
    r"(ram_(?:pread|pwrite|flush) \([^)]*)\)\n\{\n",
    r"\1, uint32_t flags)\n{\n  (void) flags;\n",
    VERSION_1,
)
MORE_2 = """
static int ram_extents (void *handle, uint32_t count, uint64_t offset, uint32_t flags,
                        struct nbdkit_extents *extents)
{
  (void) handle;
  if (flags & NBDKIT_FLAG_REQ_ONE)
    return nbdkit_add_extent (extents, offset, count, NBDKIT_EXTENT_ZERO);
  if (nbdkit_add_extent (extents, 0, 8192, 0) == -1)
    return -1;
  return nbdkit_add_extent (extents, 8192, sizeof disk - 8192,
                            NBDKIT_EXTENT_HOLE | NBDKIT_EXTENT_ZERO);
}

static int ram_list_exports (int readonly, int is_tls, struct nbdkit_exports *exports)
{
  (void) readonly;
  (void) is_tls;
  return nbdkit_add_export (exports, nbdkit_printf_intern ("disk-%d", 7), "the disk");
}

static int ram_can_fua (void *handle)
{
  (void) handle;
  return NBDKIT_FUA_NATIVE;
}

static int ram_block_size (void *handle, uint32_t *minimum, uint32_t *preferred, uint32_t *maximum)
{
  (void) handle;
  *minimum = 1;
  *preferred = 4096;
  *maximum = 0xffffffff;
  return 0;
}

static struct nbdkit_plugin plugin = {
  .name = "ram",
  .longname = "one letter",
  .load = ram_load,
  .config = ram_config,
  .open = ram_open,
  .get_size = ram_get_size,
  .errno_is_preserved = 0,
  .can_fua = ram_can_fua,
  .pread = ram_pread,
  .pwrite = ram_pwrite,
  .flush = ram_flush,
  .magic_config_key = "letter",
  .extents = ram_extents,
  .list_exports = ram_list_exports,
  .block_size = ram_block_size,
};
NBDKIT_REGISTER_PLUGIN (plugin)
"""
C1, C2, CPP = VERSION_1 + DESIGNATED_1, VERSION_2 + MORE_2, VERSION_2 + ASSIGNED
STRICT = ("-pedantic", "-Wall", "-Wextra", "-Werror")


def compiled(
    source: str,
    made: Path,
    *flags: str | Path,
    compiler: str = "gcc",
    headers: Path = OURS,
    shared: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Compile a text; its messages in the failure's."""
    if not (headers / "nbdkit-plugin.h").exists():
        support.missing("nbdkit-plugin.h")
    file = made.parent / (made.name + (".cpp" if compiler == "g++" else ".c"))
    file.write_text(source)
    own = [f"-I{headers}"] if headers is OURS else []
    own += ["-fPIC", "-shared"] if shared else []
    return subprocess.run(
        [support.program(compiler), *map(str, flags), *own, file, "-o", made],
        capture_output=True,
        text=True,
        timeout=60,
    )


def plugin(source: str, made: Path, *flags: str | Path, **options: Any) -> Path:
    """The shared object that a text is compiled to."""
    done = compiled(source, made, *flags, **options)
    assert done.returncode == 0, done.stderr
    return made


def output(source: str, made: Path, headers: Path) -> list[str]:
    """What a program prints, a list of its lines."""
    done = compiled(source, made, headers=headers, shared=False)
    assert done.returncode == 0, done.stderr
    return support.run(made).stdout.splitlines()


def printing(expressions: list[str], version: int) -> str:
    lines = "".join(f'  printf ("%lld\\n", (long long) ({it}));\n' for it in expressions)
    return (
        f"#define NBDKIT_API_VERSION {version}\n#include <nbdkit-plugin.h>\n#include <stdio.h>\n"
        f"int main (void)\n{{\n{lines}  return 0;\n}}\n"
    )


# -- the same facts --------------------------------------------------------------------------------

OTHER_NAMES = {
    "struct_size": "_struct_size",
    "api_version": "_api_version",
    "thread_model": "_thread_model",
    "thread_model_function": "thread_model",
}
WITH_FLAGS = ("pread", "pwrite", "flush", "trim", "zero")


@pytest.mark.parametrize("version", [1, 2])
def test_the_layout(version: int, tmp_path: Path) -> None:
    """Of every field, in nbdkit's header, in ours, and in what reads them."""
    known = {}
    for name, *_ in Structure._fields_:
        old = name.endswith("_1") and name[:-2] in WITH_FLAGS
        if old if version == 2 else name in WITH_FLAGS:
            continue
        in_c = name[:-2] if old else OTHER_NAMES.get(name, name)
        known[in_c] = (getattr(Structure, name).offset, getattr(Structure, name).size)
    kind = "struct nbdkit_plugin"
    asked = [f"sizeof ({kind})"]
    for name in known:
        asked += [f"offsetof ({kind}, {name})", f"sizeof ((({kind} *) 0)->{name})"]
    source = printing(asked, version).replace(
        "#include <stdio.h>", "#include <stddef.h>\n#include <stdio.h>"
    )
    expected = [ctypes.sizeof(Structure), *(number for pair in known.values() for number in pair)]
    for headers in (OURS, THEIRS):
        found = [int(line) for line in output(source, tmp_path / "layout", headers)]
        assert dict(zip(asked, found, strict=True)) == dict(zip(asked, expected, strict=True))
    assert len(known) == 3 + 46 - len(WITH_FLAGS)


def macros(headers: Path, tmp_path: Path) -> set[str]:
    source = tmp_path / "empty.c"
    source.write_text("#include <nbdkit-plugin.h>\n")
    own = [f"-I{OURS}"] if headers is OURS else []
    text = support.run("gcc", "-dM", "-E", *own, source).stdout
    return {line.split()[1] for line in text.splitlines() if line.startswith("#define NBDKIT_")}


def test_the_constants(tmp_path: Path) -> None:
    theirs = macros(THEIRS, tmp_path) - {"NBDKIT_COMMON_H", "NBDKIT_PLUGIN_H", "NBDKIT_VERSION_H"}
    assert {name.partition("(")[0] for name in theirs} <= {
        name.partition("(")[0] for name in macros(OURS, tmp_path)
    }
    numbers = sorted(
        name
        for name in theirs
        if re.match("NBDKIT_(API|THREAD|FLAG|FUA|CACHE|EXTENT)_", name) and "(" not in name
    )
    assert len(numbers) >= 17
    source = printing(numbers, 2)
    found = [output(source, tmp_path / "constants", headers) for headers in (OURS, THEIRS)]
    assert dict(zip(numbers, found[0], strict=True)) == dict(zip(numbers, found[1], strict=True))


def declarations(headers: Path, tmp_path: Path) -> dict[str, str]:
    """The functions that a header declares: name to text."""
    source = tmp_path / "empty.c"
    source.write_text("#include <nbdkit-plugin.h>\n")
    own = [f"-I{OURS}"] if headers is OURS else []
    text = re.sub(r"\s+", " ", support.run("gcc", "-E", "-P", *own, source).stdout)
    found = re.findall(r"extern ((?:const )?\w+ \*?(nbdkit_\w+) \([^;]*\));", text)
    return {name: re.sub(r"__attribute__ \(\(.*\)\)$", "", whole) for whole, name in found}


def test_the_functions(tmp_path: Path) -> None:
    """Those of nbdkit's header with the same types; those that our server has, and no others."""
    theirs, ours = declarations(THEIRS, tmp_path), declarations(OURS, tmp_path)
    assert theirs.keys() <= ours.keys()
    both = "#include <nbdkit-plugin.h>\n" + "".join(f"extern {it};\n" for it in theirs.values())
    plugin(both, tmp_path / "both.so", *STRICT, "-Wno-redundant-decls")
    path = library.find()
    assert path is not None
    symbols = support.run("nm", "-D", "--defined-only", path).stdout.split()
    exported = {
        it for it in symbols if it.startswith("nbdkit_") and not it.startswith(tuple(ANSWERS))
    }
    assert set(ours) == exported


def test_every_function_is_there_when_a_plugin_is_loaded(tmp_path: Path) -> None:
    names = ", ".join(f"(function *) {it}" for it in declarations(OURS, tmp_path))
    table = f"typedef void function (void);\nfunction *const table[] = {{ {names} }};\n"
    made = plugin(C2 + table, tmp_path / "all.so", "-Wl,-z,now")
    done = support.pynbdkit(made, "--dump-plugin")
    assert "\nname=ram\n" in done.stdout, done.stderr


# -- the same sources ------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [OURS, THEIRS], ids=["ours", "theirs"])
@pytest.mark.parametrize(
    ("compiler", "standard", "sources"),
    [
        ("gcc", "c90", "old C"),
        ("gcc", "c99", "C"),
        ("gcc", "c11", "C"),
        ("gcc", "gnu17", "C"),
        ("g++", "c++11", "C++"),
        ("g++", "c++17", "C++"),
        ("g++", "c++20", "C++ and C"),
    ],
)
def test_compiles(
    compiler: str, standard: str, sources: str, headers: Path, tmp_path: Path
) -> None:
    """Without a warning, where the author's own text gives cause for none."""
    texts = {
        "old C": [VERSION_1 + "struct nbdkit_plugin plugin;\nNBDKIT_REGISTER_PLUGIN (plugin)\n"],
        "C": [C1, C2],
        "C++": [CPP],
        "C++ and C": [CPP, C1, C2],
    }[sources]
    for text in texts:
        flags = [f"-std={standard}", *STRICT]
        if standard == "c90" or "C" in sources.split():
            flags += ["-Wno-missing-field-initializers", "-Wno-unused-function"]
        done = compiled(text, tmp_path / "made.so", *flags, compiler=compiler, headers=headers)
        assert (done.returncode, done.stderr) == (0, "")


def test_no_prototype_is_missing(tmp_path: Path) -> None:
    plugin(C2, tmp_path / "x.so", "-Werror", "-Wmissing-prototypes", "-Wmissing-declarations")


@pytest.mark.parametrize("name", ["nbdkit-common.h", "nbdkit-version.h"])
def test_each_header_stands_alone(name: str, tmp_path: Path) -> None:
    plugin(f"#include <{name}>\n#include <nbdkit-plugin.h>\n{C1}", tmp_path / "x.so", "-Werror")


@pytest.mark.parametrize("compiler", ["gcc", "g++"])
@pytest.mark.parametrize("version", ["3", "0", "", "-1", "two", "99999999999"])
def test_an_unknown_version_stops_the_compiler(version: str, compiler: str, tmp_path: Path) -> None:
    text = f"#define NBDKIT_API_VERSION {version}\n#include <nbdkit-plugin.h>\n"
    done = compiled(text, tmp_path / "x.so", compiler=compiler)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1, done.stderr
    assert "NBDKIT_API_VERSION must be 1 or 2" in errors[0]


@pytest.mark.parametrize("version", ['"2"', "2.0", "'2"])
def test_a_version_that_is_no_number_at_all(version: str, tmp_path: Path) -> None:
    text = f"#define NBDKIT_API_VERSION {version}\n#include <nbdkit-plugin.h>\n"
    done = compiled(text, tmp_path / "x.so")
    assert done.returncode != 0
    assert "NBDKIT_API_VERSION must be 1 or 2" in done.stderr


def test_a_version_that_comes_too_late(tmp_path: Path) -> None:
    """The functions would be called without the arguments that they have."""
    done = compiled(
        C1.replace("<nbdkit-plugin.h>", "<nbdkit-plugin.h>\n#define NBDKIT_API_VERSION 2"),
        tmp_path / "x.so",
    )
    assert done.returncode != 0
    assert "nbdkit_api_version_must_be_defined_before_the_include" in done.stderr


def test_formats_are_checked(tmp_path: Path) -> None:
    for call in (
        'nbdkit_error ("%s", 1)',
        'nbdkit_debug ("%d")',
        'nbdkit_printf_intern ("%d", "")',
    ):
        text = f"#include <nbdkit-plugin.h>\nvoid f (void) {{ {call}; }}\n"
        assert "-Wformat" in compiled(text, tmp_path / "x.so", "-Wall").stderr
        plugin(text, tmp_path / "x.so", "-Wall", "-Werror", "-DNBDKIT_NO_FORMAT_CHECK")
    text = '#include <nbdkit-plugin.h>\nvoid f (void) { nbdkit_error ("%m"); }\n'
    for standard in ("c11", "gnu11"):
        plugin(text, tmp_path / "x.so", "-Wall", "-Werror", f"-std={standard}")
    plugin(text, tmp_path / "x.so", "-Werror", *STRICT, "-std=c11")


# -- the same binaries -----------------------------------------------------------------------------


def served(server: support.ServerProcess, connect: Callable[..., Any], nbd: Any) -> dict[str, Any]:
    """What a client sees of it."""
    handle = connect(server)
    seen: dict[str, Any] = {
        "size": handle.get_size(),
        "read only": handle.is_read_only(),
        "fua": handle.can_fua(),
        "block size": handle.get_block_size(nbd.SIZE_PREFERRED),
        "before": bytes(handle.pread(4096, 0)),
    }
    handle.pwrite(b"written" * 1000, 5000)
    handle.flush()
    seen["after"] = bytes(handle.pread(65536 - 5000, 5000))
    with pytest.raises(nbd.Error) as caught:
        handle.pread(512, 4096)
    seen["error"] = caught.value.errno
    extents: list[int] = []

    def found(_name: str, _offset: int, entries: list[int], _error: object) -> None:
        extents.extend(entries)

    handle.block_status(65536, 0, found)
    seen["extents"] = extents
    handle.shutdown()
    return seen


@pytest.mark.parametrize(
    ("compiler", "source"), [("gcc", C1), ("gcc", C2), ("g++", CPP)], ids=["1", "2", "C++"]
)
def test_one_file_two_headers_two_servers(
    compiler: str,
    source: str,
    tmp_path: Path,
    serve: Callable[..., Any],
    connect: Callable[..., Any],
    nbd: Any,
    sockdir: Path,
) -> None:
    """All four serve the same."""
    seen = []
    for number, headers in enumerate((OURS, THEIRS)):
        made = plugin(source, tmp_path / f"{number}.so", compiler=compiler, headers=headers)
        words: list[str | Path] = [made, "letter=Q"]
        seen.append(served(serve(*words), connect, nbd))
        folder = sockdir / f"peer-{number}"
        folder.mkdir()
        with support.ServerProcess(folder, words, [support.program("nbdkit")]) as server:
            seen.append(served(server, connect, nbd))
    assert seen[0]["before"] == b"Q" * 4096
    assert seen[0]["after"][:14] == b"writtenwritten"
    assert seen[0]["error"] == "ENOSPC"
    assert seen[1:] == seen[:1] * 3


def test_an_export_and_its_description(tmp_path: Path) -> None:
    """Strings that the plugin makes, through both headers, listed by both servers."""
    for headers in (OURS, THEIRS):
        made = plugin(C2, tmp_path / "x.so", headers=headers)
        words = ("-U", "-", made, "--run", 'nbdinfo --list "$uri"')
        for done in (support.run("nbdkit", *words), support.pynbdkit(*words)):
            assert 'export="disk-7"' in done.stdout, done.stderr
            assert "description: the disk" in done.stdout


# -- versions --------------------------------------------------------------------------------------


def test_versions(tmp_path: Path) -> None:
    """The header's is that of nbdkit.pc; pynbdkit.pc has the package's."""
    found = {
        name: re.search("^Version: (.*)$", (OURS / f"{name}.pc").read_text(), re.M)[1]  # type: ignore[index]
        for name in ("nbdkit", "pynbdkit")
    }
    assert found["pynbdkit"] == __version__
    numbers = [f"NBDKIT_VERSION_{it}" for it in ("MAJOR", "MINOR", "MICRO")]
    lines = output(printing([*numbers, "sizeof NBDKIT_VERSION_STRING"], 2), tmp_path / "v", OURS)
    assert ".".join(lines[:3]) == found["nbdkit"]
    assert int(lines[3]) == len(found["nbdkit"]) + 1
