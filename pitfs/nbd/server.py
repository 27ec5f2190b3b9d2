"""The server: accepts connections, limits them, and lets none disturb another."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final

import trio

from pitfs.errors import PitfsError, RemoteProtocolError
from pitfs.nbd.connection import Connection, SharedResources
from pitfs.nbd.exports import Exports
from pitfs.nbd.stream import SocketStream, TlsStream, peer_name

MAX_CONNECTIONS: Final = 64
HANDSHAKE_S: Final = 30.0  # until the client has opened an export; afterwards it may be silent for ever
# A host that vanished is noticed after two minutes; without that its connection would count as open for ever.
KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))

StartTls = Callable[[trio.SocketStream], Awaitable[TlsStream]]
log = logging.getLogger(__name__)


async def serve(
    listeners: Sequence[trio.SocketListener], exports: Exports, start_tls: StartTls | None = None
) -> None:
    """Serves exports until cancelled.

    Args:
        start_tls: puts TLS over a connection, or raises PitfsError; clients must use it. None: no TLS.
    """
    shared = SharedResources(exports)
    count, is_full = 0, False

    async def handle(inner: trio.SocketStream) -> None:
        nonlocal count, is_full
        if count >= MAX_CONNECTIONS:
            if not is_full:  # logged once, not for each client
                log.warning("%s: closed: %d clients are connected already", peer_name(inner), count)
            is_full = True
            await trio.aclose_forcefully(inner)
            return
        count, is_full = count + 1, False
        try:
            await _handle(inner, shared, start_tls)
        finally:
            count -= 1
            await trio.aclose_forcefully(inner)

    await trio.serve_listeners(handle, list(listeners))


async def _handle(inner: trio.SocketStream, shared: SharedResources, start_tls: StartTls | None) -> None:
    """Serves one connection. Raises nothing, but may be cancelled."""
    peer = peer_name(inner)
    _keep_alive(inner)
    connection = Connection(SocketStream(inner), peer, shared, offers_tls=start_tls is not None)
    try:
        export = None
        with trio.move_on_after(HANDSHAKE_S) as scope:
            export = await connection.negotiate(None if start_tls is None else partial(start_tls, inner))
        if scope.cancelled_caught:
            log.warning("%s: closed: it opened no export within %g s", peer, HANDSHAKE_S)
        if export is None:
            return
        log.info("%s: reads %s", peer, export.info.name)
        await connection.serve(export.view)
        log.info("%s: is done with %s", peer, export.info.name)
    except RemoteProtocolError as error:
        log.warning("%s: closed: it doesn't keep to the protocol: %s", peer, error)
    except PitfsError as error:
        log.warning("%s: closed: %s", peer, error)
    except (OSError, trio.BrokenResourceError) as error:
        log.info("%s: the connection broke: %s", peer, error.__cause__ or error)
    except Exception:
        log.exception("%s: closed: a bug in pitfs", peer)
    finally:
        await connection.release()


def _keep_alive(inner: trio.SocketStream) -> None:
    if inner.socket.family != socket.AF_UNIX:
        with contextlib.suppress(OSError):
            inner.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in KEEPALIVE:
                inner.setsockopt(socket.IPPROTO_TCP, option, value)
