"""Folders of certificates for tests, made by certtool: good ones, and one for each way to be bad.

A folder has the files of nbdkit-tls(1) for a server and of libnbd(3) for a client:

    good      of the CA, for localhost and 127.0.0.1; the client is `CLIENT`
    bob       of the CA: a second client
    other     of another CA
    expired   of the CA, out of date
    named     of the CA, for a host that is not this one
    revoked   as `good`, with a list that revokes the client of `good`, and not that of `bob`
    nobody    ca-cert.pem alone: a client that has no certificate
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from support import run

CLIENT = ("country = US", "state = New York", "organization = Disks & Sons", "cn = alice")
CLIENT_NAME = "CN=alice,O=Disks & Sons,ST=New York,C=US"
CA_NAME = "CN=Authority good"
HERE = ("cn = localhost", "dns_name = localhost", "ip_address = 127.0.0.1")
THERE = ("cn = disks.example.com", "dns_name = disks.example.com")
PAST = (
    'activation_date = "2020-01-01 00:00:00"',
    'expiration_date = "2020-02-01 00:00:00"',
)
DAYS = "expiration_days = 30"


class Certificates:
    """The folders below `root`; `make` makes those above in it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def make(self) -> Certificates:
        """Make all folders; returns itself."""
        self._authority("good")
        self.issue("good", "server", *HERE)
        self.issue("good", "client", *CLIENT)
        for name in ("bob", "expired", "named", "nobody"):
            self._share("good", name, "ca-cert.pem", "ca-key.pem")
        self.issue("bob", "client", "cn = bob")
        self.issue("expired", "server", *HERE, *PAST)
        self.issue("expired", "client", "cn = late", *PAST)
        self.issue("named", "server", *THERE)
        os.unlink(self["nobody"] / "ca-key.pem")
        self._authority("other")
        self.issue("other", "server", *HERE)
        self.issue("other", "client", "cn = mallory")
        shutil.copytree(self["good"], self["revoked"])
        self.revoke("revoked", "client-cert.pem")
        return self

    def __getitem__(self, name: str) -> Path:
        return self.root / name

    def uri(self, uri: str, name: str = "good", user: str = "localhost") -> str:
        """A server's URI as libnbd wants it, for a client with the files of a folder."""
        if "+unix" not in uri:
            return f"{uri}?tls-certificates={self[name]}"
        secure = uri.replace("nbd+", "nbds+").replace(":///", f"://{user}/")
        return f"{secure}&tls-certificates={self[name]}"

    def issue(self, name: str, kind: str, *template: str) -> None:
        """Make kind-key.pem and kind-cert.pem in a folder, signed by the CA that it has."""
        folder = self[name]
        self._key(folder / f"{kind}-key.pem")
        lines = [*template]
        if kind in ("server", "client"):
            lines += [f"tls_www_{kind}", "signing_key", "encryption_key"]
        if not any("date" in line for line in lines):
            lines.append(DAYS)
        self._certtool(
            folder / f"{kind}-cert.pem",
            lines,
            *("--generate-certificate", "--load-privkey", folder / f"{kind}-key.pem"),
            *("--load-ca-certificate", folder / "ca-cert.pem"),
            *("--load-ca-privkey", folder / "ca-key.pem"),
        )

    def revoke(self, name: str, certificate: str) -> None:
        """Make the ca-crl.pem of a folder, which revokes one of its certificates."""
        folder = self[name]
        self._certtool(
            folder / "ca-crl.pem",
            ["crl_next_update = 30", "crl_number = 1"],
            *("--generate-crl", "--load-certificate", folder / certificate),
            *("--load-ca-certificate", folder / "ca-cert.pem"),
            *("--load-ca-privkey", folder / "ca-key.pem"),
        )

    def _authority(self, name: str) -> None:
        folder = self[name]
        folder.mkdir()
        self._key(folder / "ca-key.pem")
        self._certtool(
            folder / "ca-cert.pem",
            [f"cn = Authority {name}", "ca", "cert_signing_key", "crl_signing_key", DAYS],
            *("--generate-self-signed", "--load-privkey", folder / "ca-key.pem"),
        )

    def _share(self, source: str, name: str, *files: str) -> None:
        self[name].mkdir()
        for file in files:
            shutil.copy(self[source] / file, self[name] / file)

    def _key(self, path: Path) -> None:
        run("certtool", "--generate-privkey", "--key-type=ecdsa", "--outfile", path)
        path.chmod(0o600)

    def _certtool(self, path: Path, template: list[str], *words: str | Path) -> None:
        file = self.root / "template"
        file.write_text("\n".join(template) + "\n")
        run("certtool", *words, "--template", file, "--outfile", path)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """All of them, made once (in less than a second)."""
    return Certificates(tmp_path_factory.mktemp("certificates")).make()
