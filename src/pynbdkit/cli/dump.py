"""What --dump-config, --dump-plugin and PLUGIN --help print (nbdkit-probing(1))."""

from __future__ import annotations

import os
import socket
import sys

from .._version import __version__
from ..flags import THREAD_MODEL_NAMES
from ..tls import ROOT_FOLDER
from .system import has_selinux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..chain import Chain


def config() -> Iterator[tuple[str, str]]:
    """The lines of --dump-config."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    machine = os.uname()
    headers = os.path.join(package, "include")
    major, minor = __version__.split(".")[:2]
    yield "binary", os.path.abspath(sys.argv[0])
    yield "bindir", os.path.dirname(os.path.abspath(sys.argv[0]))
    yield "exit_with_parent", "yes" if sys.platform == "linux" else "no"
    yield "filterdir", os.path.join(package, "filters")
    yield "host_cpu", machine.machine
    yield "host_os", machine.sysname.lower()
    yield "includedir", headers
    yield "max_api_version", "2"
    yield "name", "pynbdkit"
    yield "pkgconfigdir", headers
    yield "plugindir", os.path.join(package, "plugins")
    yield "python_version", ".".join(map(str, sys.version_info[:3]))
    yield "root_tls_certificates_dir", ROOT_FOLDER
    yield "selinux", "yes" if has_selinux() else "no"
    yield "timeout_option", "yes"
    yield "tls", "yes"
    yield "tls_psk", "yes" if sys.version_info >= (3, 13) else "no"
    yield "version", __version__
    yield "version_major", major
    yield "version_minor", minor
    yield "vsock_option", "yes" if hasattr(socket, "AF_VSOCK") else "no"
    yield "zstd", "no"


def versions(chain: Chain) -> Iterator[str]:
    """The lines of PLUGIN --version, after the server's."""
    for it in chain.layers:
        yield f"{it.name} {it.version or __version__}"


def plugin(chain: Chain) -> Iterator[tuple[str, str]]:
    """The lines of --dump-plugin."""
    it = chain.plugin
    module = sys.modules.get(type(it).__module__)
    yield (
        "path",
        os.path.abspath(getattr(it, "path", None) or getattr(module, "__file__", "") or ""),
    )
    yield "name", it.name
    struct_size = getattr(it, "struct_size", None)  # of a plugin in C
    if it.version or struct_size is None:
        yield "version", it.version or __version__
    yield "api_version", str(it.api_version)
    if struct_size is not None:
        yield "struct_size", str(struct_size)
    # Of others, a class says it; a script's is found out by asking.
    most = getattr(it, "max_thread_model", type(it).thread_model)
    yield "max_thread_model", THREAD_MODEL_NAMES[most] if isinstance(most, int) else "parallel"
    if struct_size is not None:
        it.ask_thread_model()  # type: ignore[attr-defined]
    yield "thread_model", THREAD_MODEL_NAMES[it.thread_model]
    if it.forkable is True:
        yield "forkable", "yes"
    yield "errno_is_preserved", str(int(bool(getattr(it, "errno_is_preserved", 1))))
    if it.magic_config_key():
        yield "magic_config_key", it.magic_config_key()
    for name in it.callbacks():
        yield f"has_{name}", "1"
    yield from it.dump_plugin()


def help(chain: Chain) -> Iterator[str]:
    """The part of PLUGIN --help about plugin and filters."""
    for kind, it in [("plugin", chain.plugin), *(("filter", f) for f in chain.filters)]:
        yield ""
        yield f"{kind}: {it.name}" + (f" ({it.longname})" if it.longname else "")
        text = it.description
        if not text and not hasattr(it, "struct_size"):  # the class is not that of a plugin in C
            text = (type(it).__doc__ or "").strip().split("\n", 1)[0]
        if text:
            yield text
        if it.config_help():
            yield it.config_help()
