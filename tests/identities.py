"""Certificates for tests: an authority, a server, and clients with names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import support

_COMMON = "tls_www_{}\nencryption_key\nsigning_key\nexpiration_days = 30\n"


class Authority:
    """One certificate authority. `server` is a folder for --tls-certificates."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.server = folder / "server"
        self._key("ca")
        text = "cn = Test CA\nca\ncert_signing_key\nexpiration_days = 30\n"
        self._certificate("ca", text, "--generate-self-signed", "--load-privkey", self._path("ca"))
        names = "cn = localhost\ndns_name = localhost\nip_address = 127.0.0.1\n"
        self._issue(self.server, "server", names)

    def client(self, name: str, **fields: str) -> Path:
        """A folder for libnbd, with a certificate for CN=name."""
        text = "".join(f'{field} = "{value}"\n' for field, value in fields.items())
        folder = self._folder / name
        self._issue(folder, "client", f"{text}cn = {name}\n")
        return folder

    def _path(self, name: str, what: str = "key") -> Path:
        return self._folder / f"{name}-{what}.pem"

    def _key(self, name: str) -> None:
        support.run("certtool", "--generate-privkey", "--ecc", "--outfile", self._path(name))

    def _certificate(self, name: str, template: str, *words: Any) -> None:
        file = self._folder / "template"
        file.write_text(template)
        support.run("certtool", "--template", file, "--outfile", self._path(name, "cert"), *words)

    def _issue(self, folder: Path, kind: str, template: str) -> None:
        self._key(kind)
        words = ["--generate-certificate", "--load-privkey", self._path(kind)]
        words += ["--load-ca-certificate", self._path("ca", "cert")]
        words += ["--load-ca-privkey", self._path("ca")]
        self._certificate(kind, template + _COMMON.format(kind), *words)
        folder.mkdir()
        for what in ("key", "cert"):
            os.rename(self._path(kind, what), folder / f"{kind}-{what}.pem")
        os.link(self._path("ca", "cert"), folder / "ca-cert.pem")


def uri(server: Any, identity: Path | None, export: str = "") -> str:
    """The URI of an export on a Unix socket, for a client with this certificate; None: no TLS."""
    plain = f"nbd+unix:///{export}?socket={server.socket}"
    if identity is None:
        return plain
    return plain.replace("nbd", "nbds", 1) + f"&tls-certificates={identity}"
