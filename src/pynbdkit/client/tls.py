"""TLS on the client's side: the files of a URI to an SSL context, a socket to an encrypted one.

Theory: either the server proves by a certificate who it is, and the client may prove the same by
one of its own, or both prove that they know a pre-shared key. The names of the files, the folders
where they are looked for, and what is verified are libnbd's ("ENCRYPTION AND AUTHENTICATION" in
libnbd(3)); TLS 1.2 is the minimum, as in the specification ("TLS versions").

    file in the folder                   what for
    -----------------------------------  ---------------------------------------------------------
    ca-cert.pem                          whom to believe; without it, whom the system believes
    ca-crl.pem                           what to believe no longer; may be missing
    client-cert.pem, client-key.pem      to show to the server; may be missing

Everything that goes wrong is a `TlsError` of one line that names the file, or what is wrong with
the server's certificate.
"""

from __future__ import annotations

import os
import ssl
from typing import TYPE_CHECKING, Any, Final

from ..protocol.options import shorten

if TYPE_CHECKING:
    import socket

    from .uri import Tls, Uri

ROOTS_FOLDER: Final = "/etc/pki/libnbd"
HOME_FOLDERS: Final = ("~/.pki/libnbd", "~/.config/pki/libnbd")

_PSK_CIPHERS: Final = "kECDHEPSK:kDHEPSK:kPSK:!aNULL:!eNULL"
"""Of TLS 1.2 those in which both sides prove the key, with forward secrecy first."""


class TlsError(OSError):
    """TLS cannot be used, or not with this server; the text is one line for the user."""


def context_for(uri: Uri) -> ssl.SSLContext:
    """Return the context for a connection to ``uri``, whose ``tls`` is not None.

    Raises TlsError for files that are missing, unreadable or wrong.
    """
    assert uri.tls is not None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | getattr(ssl, "OP_NO_RENEGOTIATION", 0)
    if uri.tls.psk_file is not None:
        _use_psk(context, uri.tls, uri.tls.psk_file)
    else:
        _use_certificates(context, uri, uri.tls)
    return context


def start(sock: socket.socket, context: ssl.SSLContext, uri: Uri) -> ssl.SSLSocket:
    """Run the TLS handshake on a socket; returns the socket to use from now on.

    Raises TlsError, or TimeoutError if the server is silent. ``sock`` is then closed.
    """
    assert uri.tls is not None
    try:
        secure = context.wrap_socket(
            sock, server_hostname=_hostname(uri), do_handshake_on_connect=False
        )
    except OSError as error:
        sock.close()
        raise explained(error, uri) from None
    try:
        secure.do_handshake()
        # TLS 1.3 lets the server choose between the key and a certificate, which nobody verified.
        if uri.tls.psk_file is not None and secure.getpeercert(True) is not None:
            raise TlsError("the server knows no pre-shared keys: it showed a certificate instead")
    except OSError as error:
        secure.close()
        raise explained(error, uri) from None
    return secure


def ends(error: OSError) -> bool:
    """Return whether an error of the socket says that the server closed the connection."""
    return isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError | ConnectionError)


def left(uri: Uri) -> TlsError:
    """Return the error for a server that went away before it said a word over TLS.

    So goes one that does not like what it was shown, often without an alert. In TLS 1.3 that may
    be after the client's part of the handshake is over.
    """
    assert uri.tls is not None
    if uri.tls.psk_file is not None:
        why = "it does not know the user and the key, or wants certificates"
    else:
        why = "it may want a client's certificate, another than it got, or a pre-shared key"
    return TlsError(f"the server closed the connection during TLS: {why}")


def say_goodbye(sock: ssl.SSLSocket) -> None:
    """Tell the server that no more is sent, without waiting for the same from it."""
    sock.setblocking(False)
    try:
        sock.unwrap()
    except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
        pass


# --- Credentials -----------------------------------------------------------------------------


def _use_certificates(context: ssl.SSLContext, uri: Uri, tls: Tls) -> None:
    # Whoever signed a certificate in ca-cert.pem, being in it is enough; so it is in GnuTLS.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    folder = _folder(tls)
    ca = _authority(folder)
    if ca is None and tls.certificates is not None and tls.verify_peer:
        missing = os.path.join(tls.certificates, "ca-cert.pem")
        raise TlsError(f"{missing} is missing: whom the server's certificate must be signed by")
    context.check_hostname = tls.verify_peer and _hostname(uri) is not None
    if not tls.verify_peer:
        context.verify_mode = ssl.CERT_NONE
    elif ca is not None:
        _load(ca, context.load_verify_locations, ca)
    elif not context.check_hostname:
        # Anybody can have a certificate that the system believes. Its name is all that counts.
        raise TlsError(
            "whom the server's certificate should name is not known on a Unix socket: "
            "add tls-hostname=NAME to the URI, or tls-certificates=DIR with a ca-cert.pem"
        )
    else:
        context.load_default_certs()
    if folder is None:
        return
    crl = os.path.join(folder, "ca-crl.pem")
    if tls.verify_peer and os.path.exists(crl):
        _load(crl, context.load_verify_locations, crl)
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    certificate, key = (os.path.join(folder, f"client-{part}.pem") for part in ("cert", "key"))
    if os.path.exists(certificate) or os.path.exists(key):
        for path in (certificate, key):
            _load(path, _readable, path)
        _load(f"{certificate}, {key}", context.load_cert_chain, certificate, key, _no_password)


def _folder(tls: Tls) -> str | None:
    """Return the folder of the certificates, None if it is not given and there is none."""
    if tls.certificates is not None:
        if not os.path.isdir(tls.certificates):
            raise TlsError(f"tls-certificates: {tls.certificates} is not a folder")
        return tls.certificates
    if os.geteuid() == 0:
        candidates = [ROOTS_FOLDER]
    else:
        candidates = [os.path.expanduser(folder) for folder in HOME_FOLDERS]
    return next((folder for folder in candidates if os.path.isdir(folder)), None)


def _authority(folder: str | None) -> str | None:
    """Return the file of whom to believe, None if that is whom the system believes."""
    path = None if folder is None else os.path.join(folder, "ca-cert.pem")
    return path if path is not None and os.path.exists(path) else None


def _hostname(uri: Uri) -> str | None:
    """Return whom the server's certificate must name; None if that is not known."""
    assert uri.tls is not None
    if uri.tls.hostname is not None:
        return uri.tls.hostname
    # The interface of a link-local address is this machine's affair, not the certificate's.
    return None if uri.socket is not None else uri.host.partition("%")[0]


def _readable(path: str) -> None:
    with open(path, "rb"):
        pass


def _no_password() -> str:
    raise TlsError("the key is encrypted: decrypt it, for nobody is here to be asked")


def _load(what: str, call: Any, *arguments: Any) -> None:
    """Call what loads a file; its failure names the file."""
    try:
        call(*arguments)
    except TlsError as error:
        raise TlsError(f"{what}: {error}") from None
    except ssl.SSLError as error:
        mismatch = error.reason == "KEY_VALUES_MISMATCH"
        reason = "the key does not belong to the certificate" if mismatch else "not in PEM format"
        raise TlsError(f"{what}: {reason}") from None
    except OSError as error:
        raise TlsError(f"{what}: {error.strerror or error}") from None


def _use_psk(context: ssl.SSLContext, tls: Tls, path: str) -> None:
    if not getattr(ssl, "HAS_PSK", False):
        raise TlsError("tls-psk-file: pre-shared keys need Python 3.13 or newer; use certificates")
    user = _login_name() if tls.user is None else tls.user
    key = _key_of(user, path)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # Knowing the key is the proof; `start` looks after it.
    context.set_ciphers(_PSK_CIPHERS)
    new_in_313: Any = context
    new_in_313.set_psk_client_callback(lambda _hint: (user, key))


def _login_name() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        message = "tls-psk-file: the login name is not known; write nbds://USER@HOST/"
        raise TlsError(message) from None


def _key_of(user: str, path: str) -> bytes:
    """Return a user's key out of a file with lines of USER:HEX, as psktool makes it."""
    try:
        with open(path, "rb") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise TlsError(f"{path}: {error.strerror}") from None
    for line in lines:
        name, _, digits = line.rpartition(b":")
        if name == user.encode(errors="surrogateescape"):
            try:
                key = bytes.fromhex(digits.decode("ascii"))
            except ValueError:
                key = b""
            if not key:
                raise TlsError(f"{path}: the key of {shorten(user)} is not in hexadecimal digits")
            return key
    raise TlsError(f"{path}: no key of the user {shorten(user)}; name another: nbds://USER@HOST/")


# --- What went wrong, in words -----------------------------------------------------------------

_ALERTS: Final = {
    "certificate required": "it wants a client's certificate: client-cert.pem and client-key.pem",
    "unknown ca": "it does not know who signed client-cert.pem",
    "bad certificate": "it does not take client-cert.pem, or there is none",
    "certificate expired": "client-cert.pem has expired",
    "certificate revoked": "client-cert.pem is revoked",
    "certificate unknown": "it does not take client-cert.pem",
    "access denied": "it does not let this client in",
    "unknown psk identity": "it does not know the user, or the key is another",
    "decrypt error": "the pre-shared key is another, or it does not know the user",
    "bad record mac": "the pre-shared key is another, or it does not know the user",
    "handshake failure": "it has no cipher in common, or wants a pre-shared key or a certificate",
    "insufficient security": "it has no cipher in common, or wants a pre-shared key",
    "protocol version": "it has no version of TLS in common; 1.2 is the least here",
}


def explained(error: OSError, uri: Uri | None = None) -> OSError:
    """Return an error of the ssl module in words, any other as it is.

    ``uri`` is given during the TLS handshake, in which a server's going away has other reasons.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        return TlsError(_distrust(error, uri))
    if ends(error):
        return left(uri) if uri else ConnectionError("the server closed the connection")
    if isinstance(error, TimeoutError):
        return TimeoutError("timed out")
    if not isinstance(error, ssl.SSLError):
        return error
    # Some reasons have no name in Python, and are in the text alone: "[SSL] a reason (_ssl.c:1)".
    reason = error.reason or str(error).rpartition("] ")[2].partition(" (_ssl")[0]
    reason = reason.replace("_", " ").lower()
    if " alert " in reason:
        alert = reason.partition(" alert ")[2]
        return TlsError(f"the server ended TLS: {_ALERTS.get(alert, alert)}")
    if reason in ("wrong version number", "unexpected message", "packet length too long"):
        return TlsError("what the server sent is not TLS")
    return TlsError(f"TLS failed: {reason}")


def _distrust(error: ssl.SSLCertVerificationError, uri: Uri | None) -> str:
    """Return why the server's certificate is not good enough."""
    reason = error.verify_message or error.reason or str(error)
    hint = ""
    if error.verify_code in (62, 64):  # X509_V_ERR_HOSTNAME_MISMATCH, _IP_ADDRESS_MISMATCH.
        hint = "; tls-hostname=NAME says whom it must name"
    elif error.verify_code in (18, 19, 20, 21):  # Self-signed, or signed by someone unknown.
        ca = _authority(_folder(uri.tls)) if uri is not None and uri.tls is not None else None
        hint = f"; {ca} is another's" if ca else "; tls-certificates=DIR has whom to believe"
    return f"the server's certificate is not to be trusted: {reason.rstrip('.')}{hint}"
