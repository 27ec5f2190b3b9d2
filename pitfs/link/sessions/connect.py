"""The link over TCP with trio: `connect` for the production side, `serve` for the replica's."""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import trio

from pitfs.errors import LinkError, LinkRefusedError, UsageError
from pitfs.link.sessions import failures
from pitfs.link.sessions.applier import IngestProtocol
from pitfs.link.sessions.receiver import Limits, serve
from pitfs.link.sessions.sender import QUEUE_BYTES, SenderSession
from pitfs.link.transport.rate import TokenBucket
from pitfs.link.transport.streams import PlainStream, Timeouts, TlsStream
from pitfs.link.transport.tls import LinkContext
from pitfs.model.endpoint import format_endpoint, is_loopback
from pitfs.model.transfer import Hello
from pitfs.model.window import DEFAULT_WINDOW_BYTES

__all__ = ["IngestProtocol", "Limits", "SenderSession", "Timeouts", "connect", "serve"]

MIN_BURST_BYTES: Final = 16 << 10
MAX_BURST_BYTES: Final = 4 << 20
BURST_S: Final = 0.05  # of the rate: smooth, yet few sleeps
DEFAULT_TIMEOUTS: Final = Timeouts()
GOODBYE_S: Final = 1.0  # to end a session in order
# Around each segment of TCP: Ethernet 14, IP, TCP with time stamps 32.
HEADERS_BYTES: Final = {socket.AF_INET: 14 + 20 + 32, socket.AF_INET6: 14 + 40 + 32}


@asynccontextmanager
async def connect(
    host: str,
    port: int,
    *,
    tls: LinkContext | None,
    hello: Hello,
    rate_bytes_per_s: int | None,
    timeouts: Timeouts = DEFAULT_TIMEOUTS,
    queue_bytes: int = QUEUE_BYTES,
    window_bytes: int = DEFAULT_WINDOW_BYTES,
) -> AsyncIterator[SenderSession]:
    """Opens a session with the replica at HOST:PORT; it ends with the context, with all its tasks.

    Args:
        tls: of `client_context`; None only where the address is loopback.
        rate_bytes_per_s: cap on what goes out, with the headers of its packets; None for none.
        queue_bytes: what waits between the caller and the socket, before compression and behind it.
        window_bytes: how far back the codec may refer; the replica may want less.

    Raises:
        LinkRefusedError: a certificate, version or the group was refused, by us or by the replica.
        LinkError: no connection, or it broke; trying again may help.
        PositionMismatchError, CapacityError: the replica says so.
        UsageError: no TLS, and the address isn't loopback.
    """
    peer = format_endpoint(host, port)
    with trio.move_on_after(timeouts.connect_s) as scope:
        stream = await _open(host, port, peer, tls)
    if scope.cancelled_caught:
        raise LinkError(f"{peer}: no answer within {timeouts.connect_s:g} s")
    bucket = None
    if rate_bytes_per_s is not None:
        burst_bytes = int(min(max(rate_bytes_per_s * BURST_S, MIN_BURST_BYTES), MAX_BURST_BYTES))
        bucket = TokenBucket(rate_bytes_per_s * _segment_share(stream), burst_bytes, trio.current_time())
    session = SenderSession(stream, peer, tls, bucket, timeouts, queue_bytes, window_bytes)
    try:
        async with trio.open_nursery() as nursery:
            await session.start(nursery, hello)
            yield session
            nursery.cancel_scope.cancel()
        with trio.move_on_after(GOODBYE_S):
            await stream.linger()
    except BaseExceptionGroup as group:
        # The tasks of a session never raise, so the group holds what the caller's own block raised.
        error: BaseException | None = group.split(trio.Cancelled)[1]
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        raise error or group  # noqa: B904  (the error keeps its own cause)
    finally:
        await stream.aclose()


def _segment_share(stream: PlainStream) -> float:
    """The share of payload in a full packet of this connection.

    Of packets of 1,500 bytes some 4.5 % are headers. The configured rate includes them, so the bucket gets less.
    """
    connection = stream.inner.socket
    segment_bytes = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
    return segment_bytes / (segment_bytes + HEADERS_BYTES[connection.family])


async def _open(host: str, port: int, peer: str, tls: LinkContext | None) -> PlainStream:
    try:
        inner = await trio.open_tcp_stream(host, port)
    except (OSError, UnicodeError) as error:
        raise LinkError(f"{peer}: {failures.describe_os_error(error)}") from None
    try:
        if tls is None:
            address = str(inner.socket.getpeername()[0])
            if not is_loopback(address):
                raise UsageError(f"{peer}: insecure is for loopback only and {address} isn't; give certificates")
            return PlainStream(inner)
        stream = TlsStream(inner, tls, host.partition("%")[0])
        await stream.do_handshake()
        return stream
    except BaseException as error:
        await trio.aclose_forcefully(inner)
        match error:
            case ssl.SSLError():
                raise failures.tls_error(peer, error, tls) from None
            case EOFError():
                words = "it closed the connection in the TLS handshake; does it speak TLS?"
                raise LinkError(f"{peer}: {words}") from None
            case trio.BrokenResourceError() | OSError():
                raise LinkError(f"{peer}: in the TLS handshake: {failures.describe_os_error(error)}") from None
            case ValueError():  # a host name that can't stand in a certificate
                raise LinkRefusedError(f"{peer}: {error}") from None
        raise
