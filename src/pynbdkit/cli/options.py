"""The options of the command line: one table, from which parsing and the usage text come.

Options and parameters may stand in any order; long options may be shortened as long as they are
unambiguous; "--" ends the options (getopt_long(3)). The first word that is no option is the
plugin, each further one a parameter. Of an option that is given twice the last one counts, except
for those in `REPEATED`, which are gathered.
"""

from __future__ import annotations

from ..errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any, Final


class Option:
    """One option: `names` ("-f", "--foreground"), and the word for its value ("": it has none)."""

    __slots__ = ("help", "key", "metavar", "names")

    def __init__(self, key: str, names: str, metavar: str, help: str) -> None:
        self.key = key
        self.names = names.split()
        self.metavar = metavar
        self.help = help

    @property
    def shown(self) -> str:
        """The names that --help shows: the short one, and one long one."""
        long = [name for name in self.names if name.startswith("--")]
        wanted = ("--" + self.key, "--" + self.key.replace("_", "-"))
        primary = next((name for name in wanted if name in long), long[-1])
        short = [name for name in self.names if not name.startswith("--")]
        return ", ".join([*short, primary]) + (f" {self.metavar}" if self.metavar else "")


OPTIONS: Final = (
    Option("ipv4", "-4 --ipv4-only", "", "IPv4 addresses only"),
    Option("ipv6", "-6 --ipv6-only", "", "IPv6 addresses only"),
    Option("debug", "-D --debug", "NAME.FLAG=N", "set a debug flag (repeatable)"),
    Option("dump_config", "--dump-config", "", "print what is installed where, and exit"),
    Option("dump_plugin", "--dump-plugin", "", "print what the plugin is and can, and exit"),
    Option("exit_with_parent", "--exit-with-parent", "", "stop when the parent process ends"),
    Option(
        "exportname",
        "-e --export --export-name --exportname",
        "NAME",
        "the export that the URI for --run and --print-uri names",
    ),
    Option("filter", "--filter", "FILTER", "put a filter before the plugin (repeatable)"),
    Option("foreground", "-f --foreground --no-fork", "", "stay in the foreground"),
    Option("group", "-g --group", "GROUP", "change to this group once the sockets are open"),
    Option("help", "--help", "", "print this, or what a plugin takes, and exit"),
    Option("ipaddr", "-i --ip-addr --ipaddr", "ADDRESS", "listen on this address (repeatable)"),
    Option("keepalive", "--keep-alive --keepalive", "", "TCP keepalive (it always is on)"),
    Option("log", "--log", "stderr|syslog|null", "where messages go"),
    Option("mask_handshake", "--mask-handshake", "MASK", "handshake flags that may be offered"),
    Option("newstyle", "-n --new-style --newstyle", "", "the newstyle protocol (the default)"),
    Option("no_eh", "--no-eh --no-extended-headers", "", "do not offer extended headers"),
    Option("no_mc", "--no-mc --no-meta-contexts", "", "do not offer meta contexts"),
    Option("no_sr", "--no-sr --no-structured-replies", "", "do not offer structured replies"),
    Option("oldstyle", "-o --old-style --oldstyle", "", "the oldstyle protocol (no names, no TLS)"),
    Option("pidfile", "-P --pid-file --pidfile", "FILE", "write the process id, when ready"),
    Option(
        "plugin_path",
        "--plugin-path",
        "DIR[:DIR...]",
        "folders with plugins for nbdkit, searched first (repeatable)",
    ),
    Option("port", "-p --port", "PORT", "listen on this port (default 10809; 0: any free one)"),
    Option("print_uri", "--print-uri", "", "print the URI, when ready"),
    Option("readonly", "-r --read-only --readonly", "", "let clients only read"),
    Option("run", "--run", "COMMAND", "run a shell command, and end with it"),
    Option("selinux_label", "--selinux-label", "LABEL", "the SELinux label of the sockets"),
    Option("single", "-s --single --stdin", "", "serve the one client on stdin and stdout"),
    Option("swap", "--swap", "", "keep the server's memory out of swap space"),
    Option("threads", "-t --threads", "N", "requests at a time per connection (default 16)"),
    Option("timeout", "--timeout", "SECONDS", "for a handshake (default 120; 0: no limit)"),
    Option("tls", "--tls", "off|on|require", "encryption: none, offered, or demanded"),
    Option("tls_certificates", "--tls-certificates", "DIR", "the folder of TLS certificates"),
    Option("tls_psk", "--tls-psk", "FILE", "the file of pre-shared keys for TLS"),
    Option("tls_verify_peer", "--tls-verify-peer", "", "demand certificates of clients"),
    Option("unix", "-U --unix", "SOCKET|-", "listen on a Unix socket (-: a private one)"),
    Option("unix_mode", "--unix-mode", "MODE", "the Unix socket's permissions (default 755)"),
    Option("user", "-u --user", "USER", "change to this user once the sockets are open"),
    Option("verbose", "-v --verbose", "", "print debug messages"),
    Option("version", "-V --version", "", "print the version and exit"),
    Option("vsock", "--vsock", "", "listen on a vsock port (-p), not a TCP port"),
    Option("workers", "--workers", "N|auto", "processes that serve (default 1; 0, auto: per CPU)"),
)
REPEATED: Final = frozenset(("debug", "filter", "ipaddr", "plugin_path"))
LAST_COUNTS: Final = (("ipv4", "ipv6"), ("newstyle", "oldstyle"))
"""Options of which the last one on the command line takes effect."""
LOGS: Final = ("stderr", "syslog", "null")
NOT_EMPTY: Final = ("pidfile", "port", "tls_certificates", "tls_psk", "unix")

USAGE: Final = """\
pynbdkit [OPTION ...] PLUGIN [[KEY=]VALUE ...]
pynbdkit [OPTION ...] FILE.py [KEY=VALUE ...]
pynbdkit PLUGIN --help | --version | --dump-plugin
pynbdkit --help | --version | --dump-config
"""
NOTES: Final = """\
Options and parameters may stand in any order; long options may be shortened.

Without -i, -U and -s, only this machine can connect (port 10809 of 127.0.0.1 and ::1). To let
other machines in, give -i an address of this machine, or -i '' for all of them.

Without -f, --run, -s and --exit-with-parent, the server goes on in the background when it is
ready, and its messages go to the system log.

In --run's COMMAND, $uri is where to connect; see also $nbd $port $unixsocket $exportname $pid
$tls $tls_certificates $tls_psk."""


class UsageError(ConfigError):
    """A command line that cannot be understood."""

    def __str__(self) -> str:
        return f"{super().__str__()} (see 'pynbdkit --help')"


class CommandLine:
    """What was on the command line: `options` by key, the plugin's name, its parameters."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}
        self.plugin: str | None = None
        self.parameters: list[str] = []

    def __getattr__(self, key: str) -> Any:
        """An option's value: a text, True, or a list for repeated ones; None or [] if absent."""
        return self.options.get(key, [] if key in REPEATED else None)


def parse(arguments: Sequence[str]) -> CommandLine:
    """Parse a command line (without the program's name). Raises UsageError."""
    result = CommandLine()
    words = iter(arguments)
    for word in words:
        if word == "--":
            for last in words:
                _take_word(result, last)
        elif word.startswith("--"):
            _take_long(result, word, words)
        elif word.startswith("-") and word != "-":
            _take_short(result, word[1:], words)
        else:
            _take_word(result, word)
    return result


def _take_word(result: CommandLine, word: str) -> None:
    if result.plugin is None:
        result.plugin = word
    else:
        result.parameters.append(word)


def _take_long(result: CommandLine, word: str, words: Iterator[str]) -> None:
    name, has_value, value = word.partition("=")
    option = _find_long(name)
    if option.metavar:
        _set(result, option, value if has_value else _value(option, name, words))
    elif has_value:
        raise UsageError(f"option '{name}' takes no value")
    else:
        _set(result, option, True)


def _take_short(result: CommandLine, letters: str, words: Iterator[str]) -> None:
    """A cluster: "-rf", "-p10809", "-rp 10809"."""
    while letters:
        name, letters = f"-{letters[0]}", letters[1:]
        option = next((option for option in OPTIONS if name == option.names[0]), None)
        if option is None:
            raise UsageError(f"unrecognized option '{name}'")
        if option.metavar:
            _set(result, option, letters or _value(option, name, words))
            return
        _set(result, option, True)


def _value(option: Option, name: str, words: Iterator[str]) -> str:
    value = next(words, None)
    if value is None:
        raise UsageError(f"option '{name}' needs a value: {option.metavar}")
    return value


def _find_long(name: str) -> Option:
    found: dict[str, Option] = {}
    for option in OPTIONS:
        if name in option.names:
            return option
        if any(known.startswith(name) for known in option.names):
            found[option.key] = option
    if not found:
        raise UsageError(f"unrecognized option '{name}'")
    if len(found) > 1:
        choices = sorted(n for o in found.values() for n in o.names if n.startswith(name))
        raise UsageError(f"option '{name}' is ambiguous: {', '.join(choices)}")
    return next(iter(found.values()))


def _set(result: CommandLine, option: Option, value: object) -> None:
    key = option.key
    if key == "log" and value not in LOGS:
        raise UsageError(f"--log={value}: must be one of {', '.join(LOGS)}")
    if key == "tls":
        value = _tls(value)
    if key in NOT_EMPTY and not value:
        raise UsageError(f"option '{option.names[0]}' needs a value that is not empty")
    if key in REPEATED:
        result.options.setdefault(key, []).append(value)
    else:
        result.options[key] = value
    for pair in LAST_COUNTS:
        if key in pair:
            result.options.pop(pair[pair[0] == key], None)


def _tls(value: object) -> str:
    """off, on or require; the peer takes any boolean, too."""
    from ..parse import parse_bool

    if value == "require":
        return "require"
    try:
        return "on" if parse_bool(str(value)) else "off"
    except ValueError:
        raise UsageError(f"--tls={value}: must be one of off, on, require") from None


def usage() -> str:
    """The text of --help."""
    lines = [f"  {o.shown:<27} {o.help}" for o in OPTIONS]
    return "\n".join([USAGE, *lines, "", NOTES])
