"""Where the file of a plugin is that is called by its name alone, and which plugin a script wants.

nbdkit's plugins are files in one folder, called nbdkit-NAME-plugin.so, or without ".so" where they
are scripts: files that begin with a line such as "#!/usr/sbin/nbdkit perl", and that the plugin of
that name runs. They are looked for in folders of the user's own first, then where libraries are
installed. No process is run for that; only when nothing is found and there is an nbdkit on PATH
is it asked where its plugins are.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Final

VARIABLE: Final = "PYNBDKIT_PLUGIN_PATH"
"""The environment variable with more folders, separated by colons as those of PATH."""
PREFIX, SUFFIX = "nbdkit-", "-plugin"
SERVERS: Final = ("nbdkit", "pynbdkit")
"""Programs whose first argument is a plugin's name: a script's first line names one of them."""
_LONGEST_LINE: Final = 256  # as the kernel reads it (execve(2))


def find(name: str, path: Sequence[str] = ()) -> str | None:
    """The file of the plugin called `name`, None where there is none.

    `path`: folders to look in first, each text one or more of them with colons between.
    """
    if not name or "/" in name or "\0" in name:
        return None
    for folder in own_folders(path):
        if found := _in(folder, name):
            return found
    for folder in folders():
        if found := _in(folder, name):
            return found
    asked = _asked()
    return _in(asked, name) if asked else None


def own_folders(path: Sequence[str]) -> list[str]:
    """The user's folders: those of the command line before those of the environment."""
    texts = [*path, os.environ.get(VARIABLE, "")]
    return [folder for text in texts for folder in text.split(os.pathsep) if folder]


def folders() -> Iterator[str]:
    """Where nbdkit's plugins usually are: what the administrator built comes first, as on PATH."""
    machine = getattr(sys.implementation, "_multiarch", "") or f"{os.uname().machine}-linux-gnu"
    for root in ("/usr/local", "/usr"):
        for libraries in (os.path.join("lib", machine), "lib64", "lib"):
            yield os.path.join(root, libraries, "nbdkit", "plugins")


def _in(folder: str, name: str) -> str | None:
    for ending in (".so", ""):
        file = os.path.join(folder, PREFIX + name + SUFFIX + ending)
        if os.path.isfile(file):
            return file
    return None


def _asked() -> str | None:
    """The folder that the nbdkit on PATH says, None without one."""
    import shutil

    program = shutil.which("nbdkit")
    if program is None:
        return None
    import subprocess

    try:
        said = subprocess.run(
            [program, "--dump-config"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=10,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    for line in os.fsdecode(said).splitlines():
        if line.startswith("plugindir="):
            return line.removeprefix("plugindir=")
    return None


def plain_name(file: str) -> str:
    """A plugin's name, of its file's: "S3" of "…/nbdkit-S3-plugin", "disk" of "…/disk.py"."""
    name = os.path.splitext(os.path.basename(file))[0]
    if name.startswith(PREFIX) and name.endswith(SUFFIX) and len(name) > len(PREFIX + SUFFIX):
        return name[len(PREFIX) : -len(SUFFIX)]
    return name


def wanted_by(head: bytes) -> list[str]:
    """The words behind the server's name in a script's first line, [] where it names no server.

    Of "#!/usr/sbin/nbdkit perl" and of "#!/usr/bin/env -S pynbdkit perl": ["perl"]. `head`: the
    beginning of the file. That the kernel makes one word of all that follows is not imitated: no
    plugin's name has spaces.
    """
    line = head[:_LONGEST_LINE].split(b"\n", 1)[0]
    if not line.startswith(b"#!"):
        return []
    words = os.fsdecode(line[2:]).split()
    if words and os.path.basename(words[0]) == "env":
        words = words[1:]
        if words and words[0] in ("-S", "--split-string"):
            words = words[1:]
    if not words or os.path.basename(words[0]) not in SERVERS:
        return []
    return words[1:]
