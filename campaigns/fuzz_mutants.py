"""Copies of the package with one promise broken each, to see the fuzz targets notice.

A campaign that finds nothing has shown something only if it would have found what it looks for.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mutants import SOURCE as SOURCE  # the same tree is broken here
from mutants import plant


class Mutant(NamedTuple):
    """A change of one module, and the target that has to notice it."""

    target: str
    file: str
    old: str
    new: str


HANDSHAKE = "protocol/handshake_server.py"
RUNNER = "server/runner.py"
MUTANTS = {
    "an option of any length is read": Mutant(
        "handshake", HANDSHAKE, "if length > MAX_OPTION_SKIP:", "if False:"
    ),
    "exports are listed before TLS, which is required": Mutant(
        *("handshake", HANDSHAKE),
        "if self._needs_tls() and option != OPT_STARTTLS:",
        "if self._needs_tls() and option not in (OPT_STARTTLS, OPT_LIST):",
    ),
    "what was put in behind STARTTLS is taken for protocol": Mutant(
        *("handshake", HANDSHAKE),
        "        self._input.clear()\n        self._forget()\n",
        "        self._forget()\n",
    ),
    "what was agreed on before TLS stays": Mutant(
        *("handshake", HANDSHAKE),
        "        self._input.clear()\n        self._forget()\n",
        "        self._input.clear()\n",
    ),
    "contexts of one export are used for another": Mutant(
        *("handshake", HANDSHAKE),
        "return self._contexts if name == self._contexts_for else []",
        "return self._contexts",
    ),
    "the end of the disk is not looked at": Mutant(
        "requests", "server/rules.py", "if end > self._size:", "if False:"
    ),
    "a flag that was not offered is taken": Mutant(
        "requests", "server/rules.py", "if flags & ~allowed:", "if False:"
    ),
    "a cache request is not answered": Mutant(
        *("requests", RUNNER),
        "        getattr(layer, name)(*arguments)\n",
        "        getattr(layer, name)(*arguments)\n"
        "        if kind == CMD_CACHE:\n            return 0\n",
    ),
    "a payload where none belongs is taken for requests": Mutant(
        *("requests", "protocol/requests.py"),
        "(count and (kind == CMD_WRITE or flags & CMD_FLAG_PAYLOAD_LEN))",
        "(count and kind == CMD_WRITE)",
    ),
    "a write's payload may lack a byte": Mutant(
        *("requests", "protocol/requests.py"),
        "                stop = start + 28 + count\n                if stop > end:\n",
        "                stop = start + 28 + count\n                if stop > end + 1:\n",
    ),
    "a read overtakes writes that wait for their group": Mutant(
        *("requests", RUNNER),
        "                    if held:  # what comes next may take long, and replies may have an"
        " order\n                        self._run_held(held)\n",
        "",
    ),
    "a context may be named twice": Mutant(
        *("requests", "server/rules.py"), "if len(set(ids)) != len(ids) or not", "if not"
    ),
    "a worker leaves a reply where it is": Mutant(
        *("workers", "server/crew.py"),
        "                transmission.send_ready()\n        except",
        "                pass\n        except",
    ),
    "what came with the end of the handshake is lost": Mutant(
        *("connection", "server/negotiation.py"),
        "self.leftover = machine.negotiated, machine.leftover",
        'self.leftover = machine.negotiated, b""',
    ),
    "a client takes two contexts with one ID": Mutant(
        *("client", "protocol/handshake_client.py"),
        "if len(dict(self.contexts)) != len(self.contexts):",
        "if False:",
    ),
    "a client that needs TLS goes on without": Mutant(
        *("client", "protocol/handshake_client.py"),
        'if self._option == OPT_STARTTLS and self._tls == "require":',
        "if False:",
    ),
    "a client takes data from outside of what it read": Mutant(
        *("replies", "protocol/replies.py"),
        "if not size or offset < start or offset + size > start + count:",
        "if not size or offset < start:",
    ),
    "a client takes a simple reply to a structured read": Mutant(
        *("replies", "protocol/replies.py"),
        "if self._structured and (kind == CMD_READ or",
        "if self._structured and (",
    ),
    "control characters reach the terminal": Mutant(
        *("payloads", "protocol/options.py"),
        'return "".join([char if char.isprintable() else " " for char in text])',
        "return text",
    ),
    "an export's name is written as it is": Mutant(
        "uri", "client/uri.py", "quote(self.export)", "self.export"
    ),
    "a size may be too large": Mutant("words", "parse.py", "if value > MAX_SIZE:", "if False:"),
    "an option may lack its value": Mutant(
        "command-line", "cli/options.py", "    if value is None:", "    if False:"
    ),
    "a key is told in the log": Mutant(
        *("keys", "tls.py"),
        'raise ConfigError(f"TLS: {path}: line {number} is not user:key',
        'raise ConfigError(f"TLS: {path}: line {line} is not user:key',
    ),
    "an offset may be too large": Mutant(
        *("data", "plugins/_data/image.py"),
        "        if offset > MAX_SIZE:",
        "        if False:",
    ),
    "records that come together overwrite each other": Mutant(
        *("tls", "server/secure.py"),
        "read(size - filled, view[filled:])",
        "read(size - filled, view[0:])",
    ),
}


def make(name: str, folder: Path) -> Path:
    """A source tree with this mutant, below `folder`. Raises ValueError where it is out of date."""
    mutant = MUTANTS[name]
    return plant(name, mutant.file, mutant.old, mutant.new, folder)
