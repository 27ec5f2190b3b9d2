"""Streams of bytes over TCP, plain and with TLS."""

from __future__ import annotations

import fcntl
import socket
import ssl
import sys
import termios
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import trio

from pitfs.link.protocol.frames import Buffer
from pitfs.link.transport.tls import identities_of
from pitfs.model.endpoint import format_endpoint

RECEIVE_BYTES: Final = 256 << 10  # one call: large enough that the loop doesn't dominate, small against frames
TLS_RECORD_BYTES: Final = 16 << 10
JOIN_BYTES: Final = 32 << 10  # buffers up to this are joined: cheaper to copy than to send alone
# In struct tcp_info (linux/tcp.h), u64 each: tcpi_delivery_rate, and tcpi_busy_time in microseconds.
DELIVERY_RATE_AT: Final = 160
BUSY_TIME_AT: Final = 168

# What a connection that broke, or that we closed, raises from a stream.
LINK_ERRORS: Final = (trio.BrokenResourceError, trio.ClosedResourceError, OSError)  # an SSLError is an OSError


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds. A peer sends a PING each `ping_s`, so a live one is heard from four times within `dead_s`."""

    connect_s: float = 10.0
    ping_s: float = 5.0
    dead_s: float = 20.0


class PlainStream:
    """A TCP connection as it is, for loopback."""

    def __init__(self, inner: trio.SocketStream) -> None:
        self.inner = inner
        # Received into again and again: fresh memory for each call costs more than copying out of the cache.
        self._received = memoryview(bytearray(RECEIVE_BYTES))

    async def receive_some(self) -> Buffer:
        """Some bytes, valid until the next call; empty at the end of the connection.

        Raises:
            trio.BrokenResourceError: the connection broke; its cause says why.
            trio.ClosedResourceError: we closed it.
        """
        try:
            return self._received[: await self.inner.socket.recv_into(self._received)]
        except OSError as error:
            raise trio.BrokenResourceError from error

    async def send_all(self, data: Buffer) -> None:
        await self.inner.send_all(data)

    async def linger(self) -> None:
        """Ends our direction and reads the other to its end; the caller limits the time.

        Closing with unread bytes would reset the connection, and the peer might lose the last frame.
        """
        with suppress(*LINK_ERRORS):
            self.inner.socket.shutdown(socket.SHUT_WR)
            while await self.inner.receive_some(RECEIVE_BYTES):
                pass

    async def aclose(self) -> None:
        await trio.aclose_forcefully(self.inner)


class TlsStream(PlainStream):
    """TLS over a TCP connection; at most one task receives and one sends.

    It replaces trio.SSLStream for two reasons. That one never sends the alert when a handshake fails, so the peer
    doesn't learn why. And it returns at most 16 KiB for each pass through the event loop.
    """

    def __init__(
        self, inner: trio.SocketStream, context: ssl.SSLContext, server_hostname: str | None = None
    ) -> None:
        super().__init__(inner)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        is_server = server_hostname is None
        self._tls = context.wrap_bio(self._incoming, self._outgoing, is_server, server_hostname)
        self._sending = trio.Lock()  # bytes must reach the socket in the order in which they leave the BIO
        self._buffer = bytearray(RECEIVE_BYTES + TLS_RECORD_BYTES)
        self._ended = False  # the peer sent close_notify

    async def do_handshake(self) -> None:
        """
        Raises:
            ssl.SSLError: it failed; an alert was sent to the peer where TLS has one.
            EOFError: the peer closed the connection.
            trio.BrokenResourceError: the connection broke.
        """
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
            except ssl.SSLError:
                with suppress(trio.BrokenResourceError):
                    await self._flush()
                raise
            else:
                break
            data = await super().receive_some()
            if not data:
                raise EOFError
            self._incoming.write(data)
        await self._flush()

    def peer_certificate(self) -> dict[str, Any]:
        return dict(self._tls.getpeercert() or {})

    def peer_identities(self) -> frozenset[str]:
        return identities_of(self.peer_certificate(), self._tls.getpeercert(binary_form=True) or b"")

    async def receive_some(self) -> Buffer:
        """As PlainStream. An end without close_notify is an end, too: the protocol knows whether all has come.

        Raises:
            ssl.SSLError: an alert of the peer, or bytes that aren't TLS.
        """
        # Nothing is received behind close_notify, since nothing would take it out of the BIO again.
        while not self._ended:
            view = memoryview(self._buffer)
            filled = 0
            try:
                while filled < RECEIVE_BYTES and not self._ended:
                    count = self._tls.read(TLS_RECORD_BYTES, view[filled:])
                    filled += int(count)
                    self._ended = not count
            except ssl.SSLZeroReturnError:
                self._ended = True
            except ssl.SSLWantReadError:
                pass
            if self._outgoing.pending and not self._sending.locked():  # else the sending task takes it along
                await self._flush()
            if filled:
                return view[:filled]
            if self._ended:
                break
            data = await super().receive_some()
            if not data:
                return b""
            self._incoming.write(data)
        return b""

    async def send_all(self, data: Buffer) -> None:
        view = memoryview(data)
        async with self._sending:
            while len(view):
                count = self._tls.write(view[:RECEIVE_BYTES])
                view = view[count:]
                await self.inner.send_all(self._outgoing.read())

    async def linger(self) -> None:
        with suppress(ValueError, *LINK_ERRORS):
            with suppress(ssl.SSLWantReadError):
                self._tls.unwrap()  # only makes our close_notify
            await self._flush()
        await super().linger()

    async def _flush(self) -> None:
        async with self._sending:
            if self._outgoing.pending:
                await self.inner.send_all(self._outgoing.read())


def delivery_bytes_per_s(stream: trio.SocketStream) -> int:
    """The kernel's latest estimate of the delivery rate (it may be too high); 0: not known."""
    return _tcp_info(stream, DELIVERY_RATE_AT)


def busy_s(stream: trio.SocketStream) -> float:
    """For how long so far bytes waited that the peer's TCP hadn't acknowledged; 0 where the kernel doesn't know."""
    return _tcp_info(stream, BUSY_TIME_AT) / 1e6


def unsent_bytes(stream: trio.SocketStream) -> int:
    """What was sent, and the peer's TCP hasn't acknowledged."""
    return int.from_bytes(fcntl.ioctl(stream.socket.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def _tcp_info(stream: trio.SocketStream, at: int) -> int:
    try:
        info = stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, at + 8)
    except OSError:
        return 0
    return int.from_bytes(info[at:], sys.byteorder)


def peer_name(stream: trio.SocketStream) -> str:
    """HOST:PORT of the other side."""
    try:
        host, port, *_ = stream.socket.getpeername()
    except OSError:
        return "a peer that is gone"
    return format_endpoint(host, port)


def joined(buffers: Iterable[Buffer]) -> Iterator[Buffer]:
    """Joins neighbouring small buffers; large ones are passed on as they are."""
    small: list[Buffer] = []
    small_bytes = 0
    for buffer in buffers:
        if small and small_bytes + len(buffer) > JOIN_BYTES:
            yield b"".join(small)
            small, small_bytes = [], 0
        if len(buffer) > JOIN_BYTES:
            yield buffer
        else:
            small.append(buffer)
            small_bytes += len(buffer)
    if small:
        yield b"".join(small)
