"""The option table and its parser, against getopt as an independent model, and against nbdkit."""

from __future__ import annotations

import getopt
import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pynbdkit.cli import options
from pynbdkit.cli.options import LAST_COUNTS, OPTIONS, REPEATED, CommandLine, UsageError, parse
from support import run

LONG = sorted(name for option in OPTIONS for name in option.names if name.startswith("--"))
SHORT = sorted(name for option in OPTIONS for name in option.names if not name.startswith("--"))
KEY = {name: option.key for option in OPTIONS for name in option.names}
TAKES_VALUE = {name: bool(option.metavar) for option in OPTIONS for name in option.names}
VALID = {"log": "null", "tls": "off"}


def result(line: CommandLine) -> tuple[dict[str, object], str | None, list[str]]:
    return line.options, line.plugin, line.parameters


# -- the table -------------------------------------------------------------------------------------


def test_every_option_of_nbdkit_is_known() -> None:
    assert set(run("nbdkit", "--long-options").stdout.split()) <= set(LONG)
    assert set(run("nbdkit", "--short-options").stdout.split()) <= set(SHORT)


def test_names_are_unique() -> None:
    names = [name for option in OPTIONS for name in option.names]
    assert len(names) == len(set(names))
    keys = [option.key for option in OPTIONS]
    assert len(keys) == len(set(keys))
    assert set(keys) >= REPEATED | {"log", "tls"} | set(options.NOT_EMPTY)
    assert set(keys) >= {key for pair in LAST_COUNTS for key in pair}


def test_help_shows_each_option_once_and_fits_a_page() -> None:
    text = options.usage()
    for option in OPTIONS:
        shown = [line for line in text.splitlines() if line.startswith(f"  {option.shown} ")]
        assert len(shown) == 1, option.key
    assert max(map(len, text.splitlines())) <= 100
    assert "-i ''" in text  # how to let other machines in


# -- parsing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ({}, None, [])),
        (["memory"], ({}, "memory", [])),
        (["memory", "1M", "a=b"], ({}, "memory", ["1M", "a=b"])),
        (["-f", "m", "-r", "1M"], ({"foreground": True, "readonly": True}, "m", ["1M"])),
        (["-fr", "m"], ({"foreground": True, "readonly": True}, "m", [])),
        (["-p10810", "m"], ({"port": "10810"}, "m", [])),
        (["-rp", "0", "m"], ({"readonly": True, "port": "0"}, "m", [])),
        (["-U", "-", "m"], ({"unix": "-"}, "m", [])),
        (["-U-", "m"], ({"unix": "-"}, "m", [])),
        (["-U", "-f", "m"], ({"unix": "-f"}, "m", [])),
        (["--unix=-", "m"], ({"unix": "-"}, "m", [])),
        (["--unix", "--", "m"], ({"unix": "--"}, "m", [])),
        (["--run", "a b", "m"], ({"run": "a b"}, "m", [])),
        (["--run=a=b", "m"], ({"run": "a=b"}, "m", [])),
        (["--run=", "m"], ({"run": ""}, "m", [])),
        (["--run", "", "m"], ({"run": ""}, "m", [])),
        (["-i", "", "m"], ({"ipaddr": [""]}, "m", [])),
        (["--ipaddr=", "m"], ({"ipaddr": [""]}, "m", [])),
        (["-e=x", "m"], ({"exportname": "=x"}, "m", [])),
        (["--", "-f", "--run", "--", "x"], ({}, "-f", ["--run", "--", "x"])),
        (["m", "--", "-5"], ({}, "m", ["-5"])),
        (["-", "-"], ({}, "-", ["-"])),
        (["m", "", ""], ({}, "m", ["", ""])),
        ([""], ({}, "", [])),
        (["-p", "1", "--port", "2", "m"], ({"port": "2"}, "m", [])),
        (["-i", "a", "m", "-i", "b", "--ipaddr=c"], ({"ipaddr": ["a", "b", "c"]}, "m", [])),
        (["--filter=a", "--filter", "b", "m"], ({"filter": ["a", "b"]}, "m", [])),
        (["--tls=no", "m"], ({"tls": "off"}, "m", [])),
        (["--tls", "require", "m"], ({"tls": "require"}, "m", [])),
        (["-4", "-6"], ({"ipv6": True}, None, [])),
        (["-6", "-4"], ({"ipv4": True}, None, [])),
        (["-o", "-n"], ({"newstyle": True}, None, [])),
        (["-n", "-o"], ({"oldstyle": True}, None, [])),
        (["-o", "--unix-mode=660"], ({"oldstyle": True, "unix_mode": "660"}, None, [])),
        (["--no-mc", "--no-eh"], ({"no_mc": True, "no_eh": True}, None, [])),
        (
            ["--no-meta-contexts", "--no-extended-headers"],
            ({"no_mc": True, "no_eh": True}, None, []),
        ),
        (["--timeout", "5", "--vsock"], ({"timeout": "5", "vsock": True}, None, [])),
    ],
)
def test_forms(words: list[str], expected: tuple[dict[str, object], str | None, list[str]]) -> None:
    assert result(parse(words)) == expected


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-x"], "'-x'"),
        (["-fx"], "'-x'"),
        (["-f-"], "'--'"),
        (["--nosuch"], "'--nosuch'"),
        (["--verbose=1"], "'--verbose' takes no value"),
        (["--verb="], "'--verb' takes no value"),
        (["-p"], "'-p' needs a value: PORT"),
        (["-fp"], "'-p' needs a value: PORT"),
        (["--port"], "'--port' needs a value: PORT"),
        (["--ex"], "--exit-with-parent, --export, --export-name, --exportname"),
        (["--ip"], "--ip-addr, --ipaddr, --ipv4-only, --ipv6-only"),
        (["--log=foo"], "--log=foo: must be one of stderr, syslog, null"),
        (["--log="], "--log=: must be one of"),
        (["--tls=maybe"], "--tls=maybe: must be one of off, on, require"),
        (["-U", ""], "'-U'"),
        (["-P", ""], "'-P'"),
        (["--port="], "'-p'"),
        (["--tls-psk="], "'--tls-psk'"),
        (["--tls-certificates="], "'--tls-certificates'"),
    ],
)
def test_mistakes_are_named(words: list[str], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(words)
    assert says in str(caught.value)
    assert "--help" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_unambiguous_beginning_of_a_long_option_is_that_option() -> None:
    for name in LONG:
        for length in range(3, len(name) + 1):
            short = name[:length]
            meant = {KEY[n] for n in LONG if n.startswith(short)}
            full = short if short in LONG else name
            words = [short, VALID.get(KEY[full], "1")] if TAKES_VALUE[full] else [short]
            if short in LONG or len(meant) == 1:
                assert list(parse(words).options) == [KEY[full]], short
            else:
                with pytest.raises(UsageError, match="ambiguous"):
                    parse(words)


SOME = "-fr -rvp -p1 -U- --port=5 --readonly= --verb --no-s --fil --nosuch -x - -- a b=c --log=null"
WORDS = st.sampled_from([*LONG, *SHORT, *SOME.split(), "", "--run=x y", "a.b=1", "--tls=no", "1"])


@given(st.lists(WORDS, max_size=8))
def test_as_getopt(words: Sequence[str]) -> None:
    """Python's getopt, an implementation that is not ours, understands the same."""
    short = "".join(name[1] + ":" * TAKES_VALUE[name] for name in SHORT)
    long = [name[2:] + "=" * TAKES_VALUE[name] for name in LONG]
    try:
        found, rest = getopt.gnu_getopt(list(words), short, long)
    except getopt.GetoptError:
        # It does not know that two names may be one option, and it knows nothing of values.
        try:
            line = parse(words)
        except UsageError:
            return
        aliases = [w.partition("=")[0] for w in words if w.startswith("--") and w not in LONG]
        assert any(len([n for n in LONG if n.startswith(a)]) > 1 for a in aliases), line.options
        return
    expected: dict[str, object] = {}
    wrong = False
    for name, value in found:
        key = KEY[name]
        wrong |= key == "log" and value not in options.LOGS
        wrong |= key == "tls" and value not in ("off", "on", "require", "no", "1")
        wrong |= key in options.NOT_EMPTY and not value
        if key == "tls":
            value = {"no": "off", "1": "on"}.get(value, value)
        if key in REPEATED:
            gathered = expected.setdefault(key, [])
            assert isinstance(gathered, list)
            gathered.append(value)
        else:
            expected[key] = value if TAKES_VALUE[name] else True
        for one, other in (("ipv4", "ipv6"), ("oldstyle", "newstyle")):
            if key in (one, other):
                expected.pop(other if key == one else one, None)
    if wrong:
        with pytest.raises(UsageError):
            parse(words)
        return
    plugin = rest[0] if rest else None
    assert result(parse(words)) == (expected, plugin, rest[1:])


def test_any_order_is_the_same() -> None:
    groups = [["memory"], ["-f"], ["-U", "-"], ["--run", "true"], ["-t4"], ["--filter=log"]]
    expected = result(parse(list(itertools.chain(*groups, ["1M"]))))
    for order in itertools.permutations(groups):
        words = list(itertools.chain(*order))
        place = words.index("memory") + 1
        for at in (place, len(words)):
            if at < len(words) and words[at - 1] in ("-U", "--run"):
                continue
            assert result(parse([*words[:at], "1M", *words[at:]])) == expected


@given(st.lists(st.text(st.characters(codec=None), max_size=6), max_size=6))
def test_any_text_is_a_command_line_or_a_mistake(words: list[str]) -> None:
    """No other exception, whatever the bytes (those that are no UTF-8 come as surrogates)."""
    try:
        line = parse(words)
    except UsageError:
        return
    assert line.plugin is None or line.plugin in words
    assert all(word in words for word in line.parameters)
