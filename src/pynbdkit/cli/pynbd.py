"""The command ``pynbd``: tools for clients of NBD servers.

Nothing is imported before it is needed: ``pynbd --version`` is as quick as Python itself.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

HELP = """\
usage: pynbd info URI [--json] [--list] [--timeout SECONDS]
       pynbd --help | --version

Tools for clients of NBD servers.

info    Show what a server says of an export: size, what it can do, block
        sizes, metadata contexts; and which other exports the server lists.
        Nothing is read from the export.

  URI                nbd://HOST[:PORT]/EXPORT or
                     nbd+unix:///EXPORT?socket=PATH or, with TLS,
                     nbds://[USER@]HOST[:PORT]/EXPORT or
                     nbds+unix://[USER@]/EXPORT?socket=PATH, where
                     &tls-certificates=DIR, &tls-psk-file=FILE,
                     &tls-hostname=NAME and &tls-verify-peer=false may follow
  --json             print JSON, with the keys of nbdinfo --json; "listing"
                     has the name and description of each export
  -L, --list         show as much of every export that the server lists
  --timeout SECONDS  give up on a server that is silent for so long
                     (default: 30; 0 waits for ever)
"""


class _Mistake(Exception):
    """Something to tell the user in one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``pynbd`` with the arguments ``argv`` (default: those of the process).

    Returns the exit status: 0, or 1 after one line on standard error.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if not words or words[0] in ("--help", "-h", "help"):
            sys.stdout.write(HELP)
        elif words[0] in ("--version", "-V"):
            from .._version import __version__

            print(f"pynbd {__version__}")
        elif words[0] == "info":
            _info(words[1:])
        else:
            raise _Mistake(f"unknown command {words[0]!r}; see pynbd --help")
        sys.stdout.flush()
    except _Mistake as error:
        print(f"pynbd: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Whoever read the output wants no more of it. Python must not flush it again at exit.
        import os

        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def run() -> NoReturn:
    """Entry point of the console command."""
    # An export's name may hold characters that the user's locale has not.
    getattr(sys.stdout, "reconfigure", lambda **_: None)(errors="backslashreplace")
    sys.exit(main())


def _info(words: list[str]) -> None:
    uri = None
    json = list_all = False
    timeout = 30.0
    rest = iter(words)
    for word in rest:
        if word in ("--help", "-h"):
            sys.stdout.write(HELP)
            return
        if word == "--json":
            json = True
        elif word in ("--list", "-L"):
            list_all = True
        elif word == "--timeout" or word.startswith("--timeout="):
            value = word.partition("=")[2] if "=" in word else next(rest, "")
            try:
                timeout = float(value)
            except ValueError:
                timeout = -1
            if not 0 <= timeout < 1e9:
                raise _Mistake(f"info: --timeout needs a number of seconds, not {value!r}")
        elif word.startswith("-"):
            raise _Mistake(f"info: unknown option {word!r}; see pynbd --help")
        elif uri is not None:
            raise _Mistake(f"info: one URI, please: {uri!r} and {word!r} are two")
        else:
            uri = word
    if uri is None:
        raise _Mistake("info: a URI is missing, such as nbd://localhost/; see pynbd --help")

    from ..client import info
    from ..client.uri import UriError
    from ..protocol.errors import HandshakeError, ProtocolError

    try:
        report = info.gather(uri, list_all=list_all, timeout=timeout or None)
    except UriError as error:
        raise _Mistake(str(error)) from None
    except (HandshakeError, ProtocolError) as error:
        raise _Mistake(f"{uri}: {error}") from None
    except (OSError, ValueError) as error:
        raise _Mistake(f"{uri}: {getattr(error, 'strerror', None) or error}") from None
    print(info.as_json(report) if json else info.as_text(report))
