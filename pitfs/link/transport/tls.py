"""TLS for both sides: contexts from PEM files, names in certificates, and which links may do without TLS."""

from __future__ import annotations

import hashlib
import os
import socket
import ssl
from collections.abc import Iterator, Mapping
from typing import Any, Final

from pitfs.errors import UsageError
from pitfs.model.endpoint import is_loopback

GRANT_PREFIX: Final = "pitfs:group:"  # URI in a certificate's subjectAltName that grants a group


class LinkContext(ssl.SSLContext):
    """An SSL context that knows its files, for messages.

    Attributes:
        certificate_file, authority_file: where they came from.
    """

    certificate_file: str
    authority_file: str


def client_context(certificate: str, key: str, authority: str) -> LinkContext:
    """Context of a sender: shows its certificate, verifies the receiver's and its host name.

    Raises:
        UsageError: a file is missing, unreadable, no PEM, or the key isn't that of the certificate.
    """
    context = _context(ssl.PROTOCOL_TLS_CLIENT, certificate, key, authority)
    context.check_hostname = True
    return context


def server_context(certificate: str, key: str, authority: str) -> LinkContext:
    """Context of a receiver: refuses peers without a certificate of the authority.

    Raises:
        UsageError: as `client_context`.
    """
    return _context(ssl.PROTOCOL_TLS_SERVER, certificate, key, authority)


def _context(protocol: int, certificate: str, key: str, authority: str) -> LinkContext:
    for role, path in (("certificate", certificate), ("key", key), ("authority", authority)):
        try:
            with open(path, "rb") as file:
                if b"-----BEGIN" not in file.read(1 << 20):
                    raise UsageError(f"{path}: the {role} isn't a PEM file")
        except OSError as error:
            raise UsageError(f"{path}: can't read the {role}: {os.strerror(error.errno or 0)}") from None
    context = LinkContext(protocol)
    context.certificate_file, context.authority_file = certificate, authority
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(cafile=authority)
    except ssl.SSLError as error:
        raise UsageError(f"{authority}: no certificates in PEM form ({_reason(error)})") from None
    try:
        # Never ask at a terminal: a service has none.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except ssl.SSLError as error:
        raise _chain_error(certificate, key, error) from None
    return context


def _chain_error(certificate: str, key: str, error: ssl.SSLError) -> UsageError:
    reason = error.reason or ""
    if reason == "KEY_VALUES_MISMATCH" or reason == "KEY_TYPE_MISMATCH":
        return UsageError(f"{key}: this key isn't the one of the certificate {certificate}")
    if "BAD_DECRYPT" in reason or "BAD_PASSWORD" in reason or "PASSWORD" in str(error).upper():
        return UsageError(f"{key}: the key has a password; pitfs needs it without")
    if reason == "EE_KEY_TOO_SMALL" or reason == "CA_MD_TOO_WEAK":
        return UsageError(f"{certificate}: too weak for TLS today ({_reason(error)})")
    return UsageError(f"{certificate}, {key}: can't be used as certificate and key ({_reason(error)})")


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).replace("_", " ").lower()


def require_loopback(host: str) -> None:
    """Makes sure that HOST is this machine and nothing else, so that a link may go without TLS.

    Raises:
        UsageError: HOST has an address that isn't loopback, or none.
    """
    try:
        found = socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        problem = getattr(error, "strerror", error)
        raise UsageError(f"{host}: the name can't be resolved ({problem})") from None
    for *_, address in found:
        if not is_loopback(str(address[0])):
            raise UsageError(
                f"{host or 'all interfaces'}: insecure is for loopback only and {address[0]} isn't;"
                " give certificate, key and authority"
            )


def names_of(certificate: Mapping[str, Any]) -> str:
    """The subject's common name or first alternative name, for the log."""
    return next(_names(certificate), "")


def identities_of(certificate: Mapping[str, Any], encoded: bytes) -> frozenset[str]:
    """What a grants file may call a certificate: its common and alternative names, and sha256:FINGERPRINT."""
    return frozenset({*_names(certificate), f"sha256:{hashlib.sha256(encoded).hexdigest()}"})


def _names(certificate: Mapping[str, Any]) -> Iterator[str]:
    yield from (value for part in certificate.get("subject", ()) for key, value in part if key == "commonName")
    yield from (value for _, value in certificate.get("subjectAltName", ()))


def is_granted(certificate: Mapping[str, Any], group: str) -> bool:
    """Whether a verified certificate (as of `getpeercert`) may send this group.

    A certificate whose subjectAltName has URIs `pitfs:group:NAME` may send those groups and no other; one
    without any may send all, which is what an authority made for one pair of hosts wants.
    """
    names = certificate.get("subjectAltName", ())
    granted = [value for kind, value in names if kind == "URI" and value.startswith(GRANT_PREFIX)]
    return not granted or GRANT_PREFIX + group in granted
