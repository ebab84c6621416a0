"""The options of the command line: one table, from which parsing and the usage text come.

Options and parameters may stand in any order; long options may be shortened as long as they are
unambiguous; "--" ends the options (getopt_long(3)). The first word that is no option is the
plugin, each further one a parameter.
"""

from __future__ import annotations

from ..errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any


class Option:
    """One option: `names` ("-f", "--foreground"), and the word for its value ("": it has none)."""

    __slots__ = ("help", "key", "metavar", "names")

    def __init__(self, key: str, names: str, metavar: str, help: str) -> None:
        self.key = key
        self.names = names.split()
        self.metavar = metavar
        self.help = help


OPTIONS = (
    Option("ipv4", "-4 --ipv4-only", "", "listen on IPv4 addresses only"),
    Option("ipv6", "-6 --ipv6-only", "", "listen on IPv6 addresses only"),
    Option(
        "debug", "-D --debug", "NAME.FLAG=N", "set a debug flag of the server, plugin or filter"
    ),
    Option("dump_config", "--dump-config", "", "print what is installed where, and exit"),
    Option("dump_plugin", "--dump-plugin", "", "print what the plugin is and has, and exit"),
    Option("exit_with_parent", "--exit-with-parent", "", "end when the parent process ends"),
    Option(
        "exportname",
        "-e --export --export-name --exportname",
        "EXPORTNAME",
        "the export that --run's $uri names",
    ),
    Option("filter", "--filter", "FILTER", "put a filter in front of the plugin (repeatable)"),
    Option("foreground", "-f --foreground --no-fork", "", "do not go into the background"),
    Option("group", "-g --group", "GROUP", "change to this group after binding and opening"),
    Option("help", "--help", "", "print this, or a plugin's parameters, and exit"),
    Option(
        "ipaddr",
        "-i --ip-addr --ipaddr",
        "IPADDR",
        "listen on this address (default: loopback only; -i '' opens all interfaces)",
    ),
    Option("log", "--log", "stderr|syslog|null", "where messages go"),
    Option("mask_handshake", "--mask-handshake", "MASK", "which handshake flags may be offered"),
    Option("newstyle", "-n --new-style --newstyle", "", "the newstyle protocol (always on)"),
    Option("no_sr", "--no-sr --no-structured-replies", "", "do not offer structured replies"),
    Option("oldstyle", "-o --old-style --oldstyle", "", "the oldstyle protocol (not supported)"),
    Option("pidfile", "-P --pid-file --pidfile", "PIDFILE", "write the process id when ready"),
    Option("port", "-p --port", "PORT", "TCP port, 0 for any free one (default: 10809)"),
    Option("print_uri", "--print-uri", "", "print the URI when ready"),
    Option("readonly", "-r --read-only --readonly", "", "refuse every way to write"),
    Option("run", "--run", "COMMAND", "run a shell command on the server, end when it ends"),
    Option("selinux_label", "--selinux-label", "LABEL", "(not supported)"),
    Option("single", "-s --single --stdin", "", "serve one client on stdin and stdout"),
    Option("swap", "--swap", "", "(not supported)"),
    Option("threads", "-t --threads", "THREADS", "most requests at a time per connection (16)"),
    Option("tls", "--tls", "off|on|require", "encryption (only off is supported)"),
    Option("tls_certificates", "--tls-certificates", "DIR", "(not supported)"),
    Option("tls_psk", "--tls-psk", "FILE", "(not supported)"),
    Option("tls_verify_peer", "--tls-verify-peer", "", "(not supported)"),
    Option("unix", "-U --unix", "SOCKET|-", "listen on a Unix socket (-: a private one)"),
    Option("user", "-u --user", "USER", "change to this user after binding and opening"),
    Option("verbose", "-v --verbose", "", "print debug messages"),
    Option("version", "-V --version", "", "print the version and exit"),
    Option("vsock", "--vsock", "", "(not supported)"),
)
REPEATED = frozenset(("debug", "filter", "ipaddr"))
NOT_SUPPORTED = frozenset(
    "oldstyle selinux_label swap tls_certificates tls_psk tls_verify_peer vsock".split()
)


class UsageError(ConfigError):
    """A command line that cannot be understood."""


class CommandLine:
    """What was on the command line: `options` by key, the plugin's name, its parameters."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}
        self.plugin: str | None = None
        self.parameters: list[str] = []

    def __getattr__(self, key: str) -> Any:
        """An option's value: a text, a list for repeated ones, True; None, [] or False if absent."""
        return self.options.get(key, [] if key in REPEATED else None)


def parse(arguments: Sequence[str]) -> CommandLine:
    """Parse a command line (without the program's name). Raises UsageError."""
    short = {name: o for o in OPTIONS for name in o.names if not name.startswith("--")}
    result = CommandLine()
    words = list(arguments)
    only_words = False
    while words:
        word = words.pop(0)
        if only_words or not word.startswith("-") or word == "-":
            if result.plugin is None:
                result.plugin = word
            else:
                result.parameters.append(word)
        elif word == "--":
            only_words = True
        elif word.startswith("--"):
            name, has_value, value = word.partition("=")
            option = _find_long(name)
            if not option.metavar:
                if has_value:
                    raise UsageError(f"option '{name}' takes no value")
                _set(result, option, True)
            else:
                if not has_value:
                    if not words:
                        raise UsageError(f"option '{name}' needs a value: {option.metavar}")
                    value = words.pop(0)
                _set(result, option, value)
        else:
            letters = word[1:]
            while letters:
                name, letters = letters[0], letters[1:]
                found = short.get(f"-{name}")
                if found is None:
                    raise UsageError(f"unrecognized option '-{name}'")
                if not found.metavar:
                    _set(result, found, True)
                    continue
                if not letters:
                    if not words:
                        raise UsageError(
                            f"option '{found.names[0]}' needs a value: {found.metavar}"
                        )
                    letters = words.pop(0)
                _set(result, found, letters)
                letters = ""
    return result


def _find_long(name: str) -> Option:
    found: dict[str, Option] = {}
    for option in OPTIONS:
        for known in option.names:
            if known == name:
                return option
            if known.startswith(name) and known.startswith("--"):
                found[option.key] = option
    if not found:
        raise UsageError(f"unrecognized option '{name}'")
    if len(found) > 1:
        choices = sorted(n for o in found.values() for n in o.names if n.startswith(name))
        raise UsageError(f"option '{name}' is ambiguous: {', '.join(choices)}")
    return next(iter(found.values()))


def _set(result: CommandLine, option: Option, value: object) -> None:
    if option.key in REPEATED:
        result.options.setdefault(option.key, []).append(value)
    else:
        result.options[option.key] = value
    if option.key == "ipv4":  # the last one takes effect
        result.options.pop("ipv6", None)
    elif option.key == "ipv6":
        result.options.pop("ipv4", None)


def usage() -> str:
    """The text of --help."""
    lines = [
        "pynbdkit [OPTION ...] PLUGIN [[KEY=]VALUE ...]",
        "pynbdkit [OPTION ...] FILE.py [KEY=VALUE ...]",
        "pynbdkit PLUGIN --help | --dump-plugin",
        "pynbdkit --help | --version | --dump-config",
        "",
    ]
    for option in OPTIONS:
        names = ", ".join(option.names)
        if option.metavar:
            names += f" {option.metavar}"
        lines.append(f"  {names:<44} {option.help}")
    return "\n".join(lines)
