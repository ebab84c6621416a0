"""TLS: the server's credentials, and the contexts made from them.

Either certificates (a folder with the files that nbdkit-tls(1) names) or pre-shared keys. The
oldest version that is spoken is TLS 1.2 (NBD protocol, "TLS versions"), with ciphers that keep what
was recorded secret when a key is stolen later, and that GnuTLS and OpenSSL both have. There is no
compression, no renegotiation, and no ticket to resume a session by.

`ssl` is imported when the first `Credentials` are made: a server without TLS does not pay for it.
"""

from __future__ import annotations

import os
import stat
import threading

from . import log
from .errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl
    from typing import Any, Final

ROOT_FOLDER: Final = "/etc/pki/nbdkit"
USER_FOLDERS: Final = (".pki/nbdkit", ".config/pki/nbdkit")
"""Below the home folder: where a user's server looks, in this order."""
CA, CERTIFICATE, KEY, CRL = "ca-cert.pem", "server-cert.pem", "server-key.pem", "ca-crl.pem"
CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""For TLS 1.2; those of TLS 1.3 are all good."""
PSK_CIPHERS: Final = "ECDHE-PSK-CHACHA20-POLY1305:kECDHEPSK+AES"
"""For TLS 1.2. TLS 1.3 takes ChaCha20 for pre-shared keys: it wants SHA-256 with them."""
LONGEST_KEY: Final = 256
"""Bytes of a pre-shared key that OpenSSL takes."""
_SHORT: Final = {
    "commonName": "CN",
    "localityName": "L",
    "stateOrProvinceName": "ST",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "countryName": "C",
    "streetAddress": "street",
    "domainComponent": "DC",
    "userId": "UID",
    "emailAddress": "EMAIL",
    "surname": "surName",
}
"""From OpenSSL's names to those of RFC 4514, and GnuTLS's where that has none; others agree."""


def default_folders() -> list[str]:
    """Where certificates are looked for when no folder is given (nbdkit-tls(1))."""
    if os.geteuid() == 0:
        return [ROOT_FOLDER]
    home = os.environ.get("HOME")
    return [os.path.join(home, folder) for folder in USER_FOLDERS] if home else []


def find_certificates() -> str | None:
    """The default folder that has a server's certificate; None where none has."""
    for folder in default_folders():
        if os.path.exists(os.path.join(folder, CERTIFICATE)):
            return folder
    return None


class _Attempt(threading.local):
    """Whom the handshake of this thread has asked for (a callback is not told its connection)."""

    user = ""
    known = False


class Credentials:
    """Certificates or pre-shared keys of a server.

    Arguments:
        certificates: the folder of server-cert.pem and server-key.pem, and of ca-cert.pem
            (needed to verify clients) and ca-crl.pem (optional); None: the default folders.
        psk: the path of a file with lines "user:key in hexadecimal digits"; then certificates are
            not used. Needs Python 3.13.
        verify_peer: refuse clients without a certificate that the CA has signed, or with one that
            it has revoked.

    Raises ConfigError for what is missing or wrong in the files.
    """

    def __init__(
        self, certificates: str | None = None, psk: str | None = None, verify_peer: bool = False
    ) -> None:
        self._certificates = certificates
        self._psk = psk
        self.verify_peer = verify_peer and psk is None
        self._attempt = _Attempt()
        self._warned: set[str] = set()
        self._context = self._load()

    @property
    def uses_psk(self) -> bool:
        """Whether clients prove who they are by pre-shared keys."""
        return self._psk is not None

    def context(self) -> ssl.SSLContext:
        """The context for a new connection; its handshake is to run in the calling thread."""
        self._attempt.user, self._attempt.known = "", False
        return self._context

    def user(self) -> tuple[str, bool]:
        """The user that this thread's last handshake was asked for, and whether there is one."""
        return self._attempt.user, self._attempt.known

    def reload(self) -> bool:
        """Read the files again, for new connections. On failure one line goes to the log, and what
        was read before stays in use."""
        try:
            self._context = self._load()
        except ConfigError as failure:
            log.error(f"TLS credentials are not replaced: {failure}")
            return False
        log.debug("TLS credentials were read again")
        return True

    # -- loading ---------------------------------------------------------------------------------

    def _load(self) -> ssl.SSLContext:
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= (
            ssl.OP_NO_COMPRESSION
            | ssl.OP_NO_RENEGOTIATION
            | ssl.OP_NO_TICKET
            | ssl.OP_CIPHER_SERVER_PREFERENCE
        )
        context.num_tickets = 0
        if self._psk is not None:
            self._load_keys(context, self._psk)
        else:
            self._load_certificates(context)
        return context

    def _load_certificates(self, context: ssl.SSLContext) -> None:
        import ssl

        folder = self._certificates
        if folder is None:
            folder = find_certificates()
            if folder is None:
                where = " or ".join(default_folders()) or "a home folder ($HOME is not set)"
                raise ConfigError(
                    f"TLS: no {CERTIFICATE} in {where}: name a folder with --tls-certificates=DIR,"
                    " or keys with --tls-psk=FILE"
                )
        elif not os.path.isdir(folder):
            raise ConfigError(f"TLS: {folder} is not a folder with certificates")
        names = [CERTIFICATE, KEY, CA] if self.verify_peer else [CERTIFICATE, KEY]
        paths = {name: os.path.join(folder, name) for name in (CERTIFICATE, KEY, CA, CRL)}
        for name in names:
            _check_readable(paths[name])
        self._check_private(paths[KEY])
        context.set_ciphers(CIPHERS)
        try:
            context.load_cert_chain(paths[CERTIFICATE], paths[KEY], password=_no_password)
        except ssl.SSLError as error:
            raise ConfigError(_why_not_loaded(error, paths)) from None
        except OSError as error:
            raise ConfigError(f"TLS: {folder}: {error.strerror}") from None
        if self.verify_peer:
            context.verify_mode = ssl.CERT_REQUIRED
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the CA may have a CA above it
            _load_authorities(context, paths[CA])
            if os.path.exists(paths[CRL]):
                _check_readable(paths[CRL])
                _load_authorities(context, paths[CRL])
                context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF

    def _load_keys(self, context: ssl.SSLContext, path: str) -> None:
        if not hasattr(context, "set_psk_server_callback"):
            import platform

            raise ConfigError(
                f"TLS: pre-shared keys need Python 3.13 or newer, this is"
                f" {platform.python_version()}: use certificates (--tls-certificates=DIR)"
            )
        _check_readable(path)
        keys = read_keys(path)
        self._check_private(path)
        attempt = self._attempt

        def find(identity: str | None) -> bytes:
            attempt.user = identity or ""
            key = keys.get(attempt.user, b"")
            attempt.known = bool(key)
            return key  # empty: there is no such user

        context.set_ciphers(PSK_CIPHERS)
        context.set_psk_server_callback(find)

    def _check_private(self, path: str) -> None:
        mode = stat.S_IMODE(os.stat(path).st_mode)
        if mode & (stat.S_IRGRP | stat.S_IROTH) and path not in self._warned:
            self._warned.add(path)
            log.warning(f"{path} can be read by others (mode {mode:04o}): chmod 0600 {path}")


def _check_readable(path: str) -> None:
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        hint = ""
        if isinstance(error, FileNotFoundError) and path.endswith(".pem"):
            hint = " (docs/tls.md tells how to make it)"
        raise ConfigError(f"TLS: {path}: {error.strerror}{hint}") from None


def _no_password() -> str:
    raise ConfigError(
        f"TLS: {KEY} is encrypted: store it without a password, readable by the server alone"
    )


def _why_not_loaded(error: ssl.SSLError, paths: dict[str, str]) -> str:
    if error.reason == "KEY_VALUES_MISMATCH":
        return f"TLS: {paths[KEY]} is not the key of {paths[CERTIFICATE]}"
    if error.reason in ("EE_KEY_TOO_SMALL", "CA_MD_TOO_WEAK", "CA_KEY_TOO_SMALL"):
        return f"TLS: {paths[CERTIFICATE]} is too weak ({_words(error)}): make a new one"
    for path, kind in ((paths[CERTIFICATE], b"CERTIFICATE"), (paths[KEY], b"PRIVATE KEY")):
        with open(path, "rb") as file:
            if kind not in file.read(1 << 20):
                return f"TLS: {path} has no {kind.decode().lower()} in PEM form"
    return f"TLS: {paths[CERTIFICATE]} and {paths[KEY]} cannot be loaded: {_words(error)}"


def _load_authorities(context: ssl.SSLContext, path: str) -> None:
    import ssl

    try:
        context.load_verify_locations(cafile=path)
    except ssl.SSLError as error:
        raise ConfigError(f"TLS: {path} cannot be loaded: {_words(error)}") from None


def read_keys(path: str) -> dict[str, bytes]:
    """The users of a file of pre-shared keys (psktool(1)), and their keys. Raises ConfigError."""
    keys: dict[str, bytes] = {}
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not a text"
        raise ConfigError(f"TLS: {path}: {why}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        user, colon, digits = line.strip().rpartition(":")
        try:
            key = bytes.fromhex(digits)
        except ValueError:
            key = b""
        if not (user and colon and key):  # the line is not quoted: it may hold a key
            raise ConfigError(f"TLS: {path}: line {number} is not user:key in hexadecimal digits")
        if len(key) > LONGEST_KEY:
            raise ConfigError(
                f"TLS: {path}: line {number}: a key has at most {LONGEST_KEY} bytes, not {len(key)}"
            )
        if user in keys:
            raise ConfigError(f"TLS: {path}: line {number}: user {user} is there already")
        keys[user] = key
    if not keys:
        raise ConfigError(f"TLS: {path} has no keys: psktool -u USER -p {path} makes one")
    return keys


def _words(error: ssl.SSLError) -> str:
    """What OpenSSL says, for people."""
    return (error.reason or error.strerror or "unknown error").replace("_", " ").lower()


# -- who the client is, and why it is refused ------------------------------------------------------


def distinguished_name(name: tuple[tuple[tuple[str, str], ...], ...]) -> str:
    """A name, as `SSLObject.getpeercert` gives it, in the form of RFC 4514: "CN=client,O=us"."""
    return ",".join(
        "+".join(f"{_SHORT.get(kind, kind)}={_escaped(value)}" for kind, value in part)
        for part in reversed(name)
    )


def _escaped(value: str) -> str:
    """RFC 4514, section 2.4."""
    text = "".join("\\00" if c == "\0" else f"\\{c}" if c in '"+,;<>\\' else c for c in value)
    if text.startswith(("#", " ")):
        text = "\\" + text
    if len(value) > 1 and value.endswith(" "):
        text = text[:-1] + "\\ "
    return text


def peer_names(certificate: dict[str, Any] | None) -> tuple[str, str]:
    """Subject and issuer of a verified certificate (`SSLObject.getpeercert`), or "" and ""."""
    if not certificate:
        return "", ""
    return (
        distinguished_name(certificate.get("subject", ())),
        distinguished_name(certificate.get("issuer", ())),
    )


_REASONS: Final = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the client has shown no certificate",
    "NO_SHARED_CIPHER": "client and server have no cipher in common",
    "NO_SHARED_GROUP": "client and server have no group in common",
    "NO_SUITABLE_KEY_SHARE": "client and server have no group in common",
    "NO_SUITABLE_SIGNATURE_ALGORITHM": "client and server have no signature algorithm in common",
    "UNSUPPORTED_PROTOCOL": "the client speaks no TLS 1.2 or newer",
    "VERSION_TOO_LOW": "the client speaks no TLS 1.2 or newer",
    "TLSV1_ALERT_PROTOCOL_VERSION": "the client takes no version of TLS that the server has",
}
_NO_TLS: Final = (
    "WRONG_VERSION_NUMBER",
    "HTTP_REQUEST",
    "HTTPS_PROXY_REQUEST",
    "UNKNOWN_PROTOCOL",
    "BAD_RECORD_TYPE",
    "RECORD_LAYER_FAILURE",
    "PACKET_LENGTH_TOO_LONG",
    "NOT_SSL_RECORD_LAYER",
    "RECORD_TOO_SMALL",
    "UNEXPECTED_MESSAGE",
    "LENGTH_MISMATCH",
    "LENGTH_TOO_SHORT",
    "BAD_LENGTH",
)
_WRONG_KEY: Final = (
    "BINDER_DOES_NOT_VERIFY",
    "BAD_PSK",
    "DIGEST_CHECK_FAILED",
    "DECRYPTION_FAILED_OR_BAD_RECORD_MAC",
    "RECORD_LAYER_FAILURE",
    "BAD_EXTENSION",
)


def why_refused(error: ssl.SSLError, credentials: Credentials) -> str:
    """Why a handshake in this thread has failed, in words for the operator."""
    reason = error.reason or ""
    message = getattr(error, "verify_message", "")
    if message:
        return f"the client's certificate is refused: {message}"
    if credentials.uses_psk:
        user, known = credentials.user()
        if user and not known:
            return f"there is no user {user!r} among the pre-shared keys"
        if known and reason in _WRONG_KEY:
            return f"the client has not the key of user {user!r}"
    if reason in _NO_TLS:
        return f"what the client sends is not TLS ({_words(error)})"
    if reason in _REASONS:
        text = _REASONS[reason]
        if credentials.uses_psk and not credentials.user()[0]:
            text += "; it offers no pre-shared key"
        return text
    if "_ALERT_" in reason:
        alert = reason.partition("_ALERT_")[2].replace("_", " ").lower()
        return f"the client refuses: {alert}"
    return _words(error)
