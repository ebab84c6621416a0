"""--tls and what belongs to it: who gets encryption, who an error; the files are read again."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from command import COMMAND, daemon, running, wait_for_file
from pynbdkit import tls
from pynbdkit.cli.encryption import encryption
from pynbdkit.cli.options import parse
from pynbdkit.errors import ConfigError
from support import ServerProcess, need_root, program, pynbdkit, run

Serve = Callable[..., ServerProcess]
SHOW = 'echo "${tls-unset} $uri"'


def make_pki(folder: Path, name: str) -> Path:
    """A CA, a server's certificate for this machine, a client's, in a new folder."""
    folder.mkdir()
    texts = {
        "ca": f"cn = {name}\nca\ncert_signing_key\n",
        "server": "cn = localhost\ndns_name = localhost\nip_address = 127.0.0.1\n"
        "tls_www_server\nsigning_key\n",
        "client": f"cn = client of {name}\ntls_www_client\nsigning_key\n",
    }
    for kind, text in texts.items():
        (folder / f"{kind}.info").write_text(text)
        key = run("certtool", "--generate-privkey", "--key-type=ecdsa").stdout
        (folder / f"{kind}-key.pem").touch(0o600)
        (folder / f"{kind}-key.pem").write_text(key)
        words: list[str | Path] = [
            "--load-privkey",
            folder / f"{kind}-key.pem",
            "--template",
            folder / f"{kind}.info",
        ]
        if kind == "ca":
            words += ["--generate-self-signed"]
        else:
            words += ["--generate-certificate", "--load-ca-certificate", folder / "ca-cert.pem"]
            words += ["--load-ca-privkey", folder / "ca-key.pem"]
        run("certtool", *words, "--outfile", folder / f"{kind}-cert.pem")
    return folder


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pki(tmp_path_factory.mktemp("pki") / "one", "One")


@pytest.fixture
def no_default(monkeypatch: pytest.MonkeyPatch, sockdir: Path) -> Path:
    """The default folder, which is not there yet."""
    folder = sockdir / "default"
    monkeypatch.setattr(tls, "default_folders", lambda: [str(folder)])
    return folder


def mode(*words: str | Path) -> tuple[str, bool]:
    kind, credentials = encryption(parse([*map(str, words), "memory"]))
    return kind, credentials is not None


def words_of(uri: str) -> str:
    """What a URI says of TLS: its scheme, and its query but for the socket."""
    scheme, _, rest = uri.partition("://")
    query = rest.partition("?")[2].split("&")
    return " ".join([scheme, *(word for word in query if word[:7] not in ("", "socket="))])


# -- which mode ------------------------------------------------------------------------------------


def test_named_certificates_are_offered(pki: Path, no_default: Path) -> None:
    assert mode() == ("off", False)
    assert mode(f"--tls-certificates={pki}") == ("on", True)
    assert mode("--tls=on", f"--tls-certificates={pki}") == ("on", True)
    assert mode("--tls=require", f"--tls-certificates={pki}") == ("require", True)
    assert mode("-o") == ("off", False)


def test_certificates_in_the_default_folder_are_offered(pki: Path, no_default: Path) -> None:
    """As by nbdkit; with a warning where they cannot be used, because nobody has asked for them."""
    shutil.copytree(pki, no_default)
    assert mode() == ("on", True)
    assert mode("--tls=off") == ("off", False)
    assert mode("-o") == ("off", False)


def test_default_certificates_that_cannot_be_used(
    pki: Path, no_default: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(pki, no_default)
    (no_default / "server-key.pem").write_text("nonsense")
    assert mode() == ("off", False)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pynbdkit: warning: TLS: ")
    assert "server-key.pem" in line
    for asked in ("--tls=on", "--tls=require", "--tls-verify-peer"):
        with pytest.raises(ConfigError, match=r"server-key\.pem"):
            mode(asked)


def test_off_is_off_and_says_what_is_of_no_use(
    pki: Path, no_default: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--tls-verify-peer", "--tls-psk=/nonexistent", f"--tls-certificates={pki}"]
    assert mode("--tls=off", *words) == ("off", False)
    assert capsys.readouterr().err == (
        "pynbdkit: warning: --tls=off: --tls-certificates and --tls-psk and --tls-verify-peer will"
        " not be used\n"
    )


@pytest.mark.parametrize(
    "words",
    ["--tls=on", "--tls=require", "--tls-verify-peer", "--tls-certificates .", "--tls-psk x"],
)
def test_oldstyle_has_no_tls(words: str, no_default: Path) -> None:
    with pytest.raises(ConfigError, match=f"^-o and {words.split()[0]} exclude each other"):
        mode("-o", *words.split())


def test_keys_go_before_certificates(
    pki: Path, no_default: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by nbdkit; and the files are found from wherever the server is later."""
    made: list[tuple[object, ...]] = []

    class Credentials:
        def __init__(self, *arguments: object) -> None:
            made.append(arguments)

    monkeypatch.setattr(tls, "Credentials", Credentials)
    monkeypatch.chdir(pki)
    mode("--tls-psk=keys", "--tls-certificates=.")
    mode("--tls-certificates=.", "--tls-verify-peer")
    shutil.copytree(pki, no_default)
    mode("--tls=require")
    assert made == [
        (None, str(pki / "keys"), False),
        (str(pki), None, True),
        (str(no_default), None, False),
    ]


# -- as nbdkit -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--tls=off",
        "--tls=on --tls-certificates=PKI",
        "--tls-certificates=PKI",
        "--tls=require --tls-certificates=PKI",
        "--tls=require --tls-certificates=PKI -e name",
        "--tls=require --tls-certificates=PKI -p 0",
        "--tls=yes --tls-certificates=PKI",
    ],
)
def test_variables_are_nbdkits(words: str, pki: Path) -> None:
    """But that the URI says where the client finds the certificates, as newer versions do."""
    options = [word.replace("PKI", str(pki)) for word in words.split()]
    where = [] if "-p" in options else ["-U", "-"]
    results = []
    for command in ([program("nbdkit")], COMMAND):
        line = [*command, *where, *options, "memory", "1M", "--run", SHOW]
        out = subprocess.run(line, capture_output=True, text=True, timeout=30, check=True).stdout
        number, uri = out.split()
        results.append((number, words_of(uri)))
    (number, theirs), ours = results
    certificates = f" tls-certificates={pki}" if number == "2" else ""
    assert ours == (number, theirs + certificates)


@pytest.mark.parametrize("where", [["-U", "-"], ["-4", "-p", "0"]])
@pytest.mark.parametrize("check", [[], ["--tls-verify-peer"]])
def test_the_uri_is_all_that_a_client_needs(where: list[str], check: list[str], pki: Path) -> None:
    words = [*where, "--tls=require", f"--tls-certificates={pki}", *check, "memory", "1M"]
    done = pynbdkit(*words, "--run", 'nbdinfo "$uri"')
    assert done.returncode == 0, done.stderr
    assert "with TLS" in done.stdout
    assert "export-size: 1048576" in done.stdout


def test_print_uri(pki: Path, sockdir: Path) -> None:
    words = ["-U", f"{sockdir}/s", "--tls=require", f"--tls-certificates={pki}", "--print-uri"]
    with running("-f", *words, "memory", "1M", stdout=-1) as process:
        assert process.stdout is not None
        uri = process.stdout.readline().decode()
        assert uri == f"nbds+unix:///?socket={sockdir}/s&tls-certificates={pki}\n"


def test_a_server_without_tls_does_not_import_it(sockdir: Path) -> None:
    code = (
        "import sys; from pynbdkit.cli.main import main; main(sys.argv[1:]);"
        " print('ssl' in sys.modules)"
    )
    words = ["-U", "-", "memory", "1M", "--run", "true"]
    done = run(sys.executable, "-c", code, *words)
    assert done.stdout == "False\n"


# -- SIGHUP ----------------------------------------------------------------------------------------


def size(uri: str, pki: Path) -> str:
    """What a client that trusts `pki` gets. Over TCP, because libnbd does not check the name, nor
    whose certificate it is, on a Unix socket."""
    return run("nbdinfo", "--size", f"{uri}?tls-certificates={pki}", check=False).stdout.strip()


def test_hangup_reads_the_files_again(pki: Path, sockdir: Path) -> None:
    """Also in the background, where the current folder is another."""
    mine = sockdir / "mine"
    shutil.copytree(pki, mine)
    other = make_pki(sockdir / "other", "Two")
    words = [
        "-4",
        "-p",
        "0",
        "-P",
        "pid",
        "--print-uri",
        "--tls=require",
        "--tls-certificates=mine",
    ]
    with (sockdir / "log").open("wb") as log:
        command = [*COMMAND, *words, "--log=stderr", "-v", "memory", "1M"]
        done = subprocess.run(
            command, cwd=sockdir, stdout=-1, stderr=log, timeout=30, check=True, text=True
        )
    uri = done.stdout.partition("?")[0]
    with daemon(sockdir / "pid") as pid:
        for each in other.iterdir():
            shutil.copy(each, mine)
        assert (size(uri, pki), size(uri, other)) == ("1048576", "")  # nothing has changed yet
        os.kill(pid, signal.SIGHUP)
        wait_for_file(sockdir / "log", "TLS credentials were read again")
        assert (size(uri, pki), size(uri, other)) == ("", "1048576")
        (mine / "server-cert.pem").write_text("nonsense")
        os.kill(pid, signal.SIGHUP)
        wait_for_file(sockdir / "log", "TLS credentials are not replaced: ")
        assert (size(uri, pki), size(uri, other)) == ("", "1048576")


def test_who_is_connected_stays(pki: Path, nbd: ModuleType, serve: Serve) -> None:
    server = serve("-v", "--tls=require", f"--tls-certificates={pki}", "memory", "1M")
    handle = nbd.NBD()
    handle.set_tls(nbd.TLS_REQUIRE)
    handle.set_tls_certificates(str(pki))
    handle.connect_unix(str(server.socket))
    handle.pwrite(b"x" * 512, 0)
    server.process.send_signal(signal.SIGHUP)
    wait_for_file(server.log_path, "TLS credentials were read again")
    assert handle.pread(512, 0) == b"x" * 512
    handle.shutdown()


def test_without_tls_a_hangup_is_what_it_always_was(sockdir: Path) -> None:
    server = ServerProcess(sockdir, ["memory", "1M"])
    assert server.stop(signal.SIGHUP) == -signal.SIGHUP


def test_a_hangup_with_one_client_on_stdin(pki: Path) -> None:
    ours, client = socket.socketpair()
    words = ["-s", "-v", "--tls=on", f"--tls-certificates={pki}", "memory", "1M"]
    with client, running(*words, stdin=ours, stdout=ours, stderr=-1) as process:
        ours.close()
        assert client.recv(18)[:8] == b"NBDMAGIC"
        process.send_signal(signal.SIGHUP)
        assert process.stderr is not None
        while b"read again" not in (line := process.stderr.readline()):
            assert line
        client.shutdown(socket.SHUT_WR)
        assert process.wait(30) == 0


def test_files_that_only_root_can_read(pki: Path, sockdir: Path) -> None:
    """They are read before root is left; what cannot be read again stays as it was."""
    need_root("becoming another user")
    shutil.copytree(pki, sockdir / "p")  # in a folder of root's
    words = ["-4", "-p", "0", "-f", "--print-uri", "--tls=require", "-u", "nobody"]
    words += [f"--tls-certificates={sockdir}/p", "memory", "1M"]
    with (
        (sockdir / "log").open("wb") as log,
        running(*words, stdout=-1, stderr=log) as process,
    ):
        assert process.stdout is not None
        uri = process.stdout.readline().decode().partition("?")[0]
        assert size(uri, pki) == "1048576"
        process.send_signal(signal.SIGHUP)
        wait_for_file(sockdir / "log", "TLS credentials are not replaced: ")
        assert size(uri, pki) == "1048576"
