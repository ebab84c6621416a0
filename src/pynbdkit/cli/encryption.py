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

    from ..tls import Credentials, find_certificates

    # Where they are is found out once: later, when SIGHUP has them read again, the current folder
    # is another (in the background), and so is the user whose default folders count (-u).
    psk = line.tls_psk
    certificates = None if psk else line.tls_certificates or find_certificates()
    if not asked and certificates is None:
        return "off", None
    try:
        credentials = Credentials(
            os.path.abspath(certificates) if certificates else None,
            os.path.abspath(psk) if psk else None,
            bool(line.tls_verify_peer),
        )
    except ConfigError as error:
        if asked:
            raise
        log.warning(f"{error} (there will be no TLS; --tls=off says so without this warning)")
        return "off", None
    return line.tls or "on", credentials
