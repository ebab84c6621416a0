"""The two ways in which an exchange goes wrong: a refusal, and a peer that breaks the protocol."""

from __future__ import annotations


class ProtocolError(Exception):
    """The peer sent what the specification forbids; nothing more can be understood from it.

    The only way on is to drop the connection ("hard disconnect" in the specification). The text
    is one line for the user: what came and what was due.
    """


class HandshakeError(Exception):
    """An option is refused; the connection goes on, and the client may try something else.

    Raised by an ``ExportSource`` (and by the payload decoders) on the server's side, and kept as
    the result of a refused handshake on the client's.

    Arguments:
        code: the refusal as ``constants.REP_ERR_*``.
        message: one line for people. It is sent to the client, so it must hold no secret.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
