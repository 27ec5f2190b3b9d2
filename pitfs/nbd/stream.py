"""Streams of bytes to a client: a plain socket, or TLS over one."""

from __future__ import annotations

import os
import socket
import struct
from typing import Final, Protocol

import trio

from pitfs.model.endpoint import format_endpoint
from pitfs.nbd.protocol import Buffer

RECEIVE_BYTES: Final = 64 << 10  # two thousand requests, which wait here until they are answered


class TlsStream(Protocol):
    """What the server needs of a TLS stream. It uses buffers again as soon as `send_all` returns."""

    async def receive_some(self) -> Buffer: ...
    async def send_all(self, data: Buffer, /) -> None: ...


class SocketStream:
    """A connected socket."""

    def __init__(self, inner: trio.SocketStream) -> None:
        self._socket = inner.socket
        self._received = memoryview(bytearray(RECEIVE_BYTES))

    async def receive(self) -> Buffer:
        """Some bytes, valid until the next call; none at the end of the connection. Raises OSError."""
        return self._received[: await self._socket.recv_into(self._received)]

    async def send(self, header: bytes, data: Buffer = b"") -> None:
        """Sends both, without a pause for other tasks where the socket has room. One caller at a time.

        Raises:
            OSError: the connection broke.
        """
        parts: list[Buffer] = [header, data] if data else [header]
        while True:
            try:
                # trio's own send always goes round its loop once, which costs as much as a small read.
                sent = os.writev(self._socket.fileno(), parts)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._socket.fileno())
                continue
            while parts and sent >= len(parts[0]):
                sent -= len(parts.pop(0))
            if not parts:
                return
            parts[0] = memoryview(parts[0])[sent:]


class WrappedStream:
    """A `SocketStream` over TLS."""

    def __init__(self, inner: TlsStream) -> None:
        self._inner = inner

    async def receive(self) -> Buffer:
        return await self._inner.receive_some()

    async def send(self, header: bytes, data: Buffer = b"") -> None:
        await self._inner.send_all(b"".join((header, data)))


def peer_name(stream: trio.SocketStream) -> str:
    """HOST:PORT of the other side; for a unix socket the process and its user."""
    peer = stream.socket
    try:
        if peer.family == socket.AF_UNIX:
            pid, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            return f"process {pid} of user {uid}"
        host, port, *_ = peer.getpeername()
    except OSError:
        return "a client that is gone"
    return format_endpoint(host, port)
