"""From --tls and what belongs to it to a mode and credentials (nbdkit-tls(1)).

Without --tls, encryption is offered where certificates or keys are named, or are in the default
folder. Whoever asks for it gets it or an error, never a server that does without.
"""

from __future__ import annotations

import os

from .. import log
from ..errors import ConfigError
from .options import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..tls import Credentials
    from .options import CommandLine


def encryption(line: CommandLine) -> tuple[str, Credentials | None]:
    """("off", None), or "on" or "require" with credentials that were read. Raises ConfigError."""
    given = {
        "--tls-certificates": line.tls_certificates,
        "--tls-psk": line.tls_psk,
        "--tls-verify-peer": line.tls_verify_peer,
    }
    named = [name for name, value in given.items() if value]
    if line.tls == "off":
        if named:
            log.warning(f"--tls=off: {' and '.join(named)} will not be used")
        return "off", None
    asked = [f"--tls={line.tls}"] if line.tls else named
    if line.oldstyle:
        if asked:
            raise UsageError(f"-o and {asked[0]} exclude each other: the oldstyle has no TLS")
        return "off", None
    if not asked and not _has_certificates():
        return "off", None

    from ..tls import Credentials

    certificates, psk = line.tls_certificates, line.tls_psk
    try:
        # In the background the current folder is another, and SIGHUP reads the files once more.
        credentials = Credentials(
            os.path.abspath(certificates) if certificates and not psk else None,
            os.path.abspath(psk) if psk else None,
            bool(line.tls_verify_peer),
        )
    except ConfigError as error:
        if asked:
            raise
        log.warning(f"{error} (there will be no TLS; --tls=off says so without this warning)")
        return "off", None
    return line.tls or "on", credentials


def _has_certificates() -> bool:
    """Whether anybody has put a server's certificate where it is looked for."""
    if os.geteuid() == 0:
        folders = ["/etc/pki/nbdkit"]
    else:
        home = os.environ.get("HOME", "")
        folders = [f"{home}/.pki/nbdkit", f"{home}/.config/pki/nbdkit"] if home else []
    return any(os.path.exists(f"{folder}/server-cert.pem") for folder in folders)
