"""Errors across the wire: to (code, message, retryable) and back; the errors of the system and of TLS in words."""

from __future__ import annotations

import errno
import os
import socket
import ssl
from typing import Final

import trio

from pitfs import errors
from pitfs.errors import CapacityError, LinkError, LinkRefusedError, PitfsError
from pitfs.link.protocol.frames import MAX_MESSAGE_LENGTH, Fault, Refuse
from pitfs.link.transport.tls import LinkContext

SHUTDOWN: Final = "shutdown"
SUPERSEDED: Final = "superseded"
BUSY: Final = "busy"
VERSION: Final = "version"
NOT_GRANTED: Final = "not-granted"
INTERNAL: Final = "internal"
STORAGE: Final = "storage"

# An error here, its code, and the error that it becomes at the sender; None: LinkError if a retry may help, else
# LinkRefusedError. Most specific first: the first class that fits gives the code.
_CODES: Final[tuple[tuple[type[PitfsError], str, type[PitfsError] | None], ...]] = (
    (CapacityError, "capacity", CapacityError),
    (errors.PositionMismatchError, "position", errors.PositionMismatchError),
    (errors.CorruptionError, "corruption", None),
    (errors.RemoteProtocolError, "protocol", None),
    (errors.StoreError, "store", None),
    (errors.UsageError, "usage", None),
    (PitfsError, "failed", None),
)
_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class PeerError(PitfsError):
    """An error of a session with a code of its own."""

    def __init__(self, code: str, message: str, *, retryable: bool) -> None:
        super().__init__(message)
        self.code = code
        self.retryable = retryable


def describe(error: Exception) -> tuple[str, str, bool]:
    """Code, message and retryable of an error, for the peer.

    Mistakes of ours come as `internal`, without their text, which may say more than a peer should know.
    """
    if isinstance(error, OSError):
        message = f"{error.filename or 'the store'}: {error.strerror}"
        no_room = error.errno in _NO_ROOM
        error = CapacityError(message) if no_room else PeerError(STORAGE, message, retryable=True)
    if not isinstance(error, PitfsError):
        return INTERNAL, "a mistake in pitfs there; its log has the details", True
    if isinstance(error, PeerError):
        code = error.code
    else:
        code = next(code for kind, code, _ in _CODES if isinstance(error, kind))
    return code, str(error)[:MAX_MESSAGE_LENGTH], error.retryable


def error_from(answer: Refuse | Fault) -> PitfsError:
    """The error that a receiver reports; its text is made fit for a terminal and a log."""
    message = "".join(character if character.isprintable() else "?" for character in answer.message)
    otherwise = LinkError if answer.retryable else LinkRefusedError
    raised = next((raised for _, code, raised in _CODES if code == answer.code), None)
    return (raised or otherwise)(message)


def describe_os_error(error: BaseException) -> str:
    """An error of the system, of a socket or of a group of attempts, in a few words."""
    match error:
        case BaseExceptionGroup():
            return describe_os_error(error.exceptions[0])
        case socket.gaierror():
            return f"the name can't be resolved ({error.strerror})"
        case ConnectionRefusedError():
            return "connection refused: is `pitfs receive` running there?"
        case TimeoutError():
            return "no answer"
        case OSError(errno=number) if number:
            return os.strerror(number)
        case trio.BrokenResourceError() | trio.ClosedResourceError():
            return describe_os_error(error.__cause__) if error.__cause__ else "the connection broke"
        case OSError() | UnicodeError() if error.__cause__ is not None:
            return describe_os_error(error.__cause__)
        case _:
            return str(error) or type(error).__name__


# OpenSSL's reason -> words about the other side; {ours} is our certificate, {authority} our authority file.
_ALERTS: Final = {
    "CERTIFICATE_REQUIRED": "it wants a certificate and got none",
    "UNKNOWN_CA": "it doesn't know the authority that signed our certificate {ours}",
    "CERTIFICATE_EXPIRED": "our certificate {ours} has expired",
    "BAD_CERTIFICATE": "it refuses our certificate {ours}",
    "CERTIFICATE_UNKNOWN": "it refuses our certificate {ours}",
    "CERTIFICATE_REVOKED": "our certificate {ours} was revoked",
    "UNSUPPORTED_CERTIFICATE": "our certificate {ours} isn't made for this use",
    "ACCESS_DENIED": "it refuses our certificate {ours}",
    "PROTOCOL_VERSION": "it doesn't speak our versions of TLS (1.2 and 1.3)",
    "INSUFFICIENT_SECURITY": "it refuses our ciphers",
    "HANDSHAKE_FAILURE": "it refused the TLS handshake: no certificate, or no cipher in common",
}
# OpenSSL's X509_V_ERR_… -> words about the other side's certificate; {reason} is OpenSSL's.
_VERIFY_ERRORS: Final = {
    9: "its certificate isn't valid yet (are both clocks right?)",
    10: "its certificate has expired",
    62: "its certificate is for another host ({reason})",
    64: "its certificate is for another host ({reason})",  # another address
}
_NOT_SIGNED: Final = "its certificate isn't signed by the authority {authority} ({reason})"
_NO_TLS: Final = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG", "UNEXPECTED_MESSAGE")


def tls_error(peer: str, error: ssl.SSLError, context: LinkContext | None) -> LinkError:
    """The error for a failed TLS handshake or a TLS alert; names our files, which the context knows."""
    ours = context.certificate_file if context else ""
    authority = context.authority_file if context else ""
    reason = error.reason or ""
    if isinstance(error, ssl.SSLCertVerificationError):
        words = _VERIFY_ERRORS.get(error.verify_code, _NOT_SIGNED)
        return LinkRefusedError(f"{peer}: {words.format(authority=authority, reason=error.verify_message)}")
    if "PEER_DID_NOT_RETURN_A_CERTIFICATE" in reason:
        return LinkRefusedError(f"{peer}: it sent no certificate")
    if "ALERT" in reason:
        words = next((text for alert, text in _ALERTS.items() if reason.endswith(alert)), "")
        if words:
            return LinkRefusedError(f"{peer}: {words.format(ours=ours)}")
    if reason in ("UNSUPPORTED_PROTOCOL", "VERSION_TOO_LOW"):
        return LinkRefusedError(f"{peer}: {_ALERTS['PROTOCOL_VERSION']}")
    if reason in _NO_TLS:
        return LinkRefusedError(f"{peer}: it doesn't speak TLS: give both sides certificates, or neither")
    return LinkError(f"{peer}: TLS: {reason.replace('_', ' ').lower() or error}")
