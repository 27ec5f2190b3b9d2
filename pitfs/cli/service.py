"""What commands that run as services share: telling the service manager, and ending on a signal."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable

import trio

log = logging.getLogger(__name__)


def notify(state: str) -> None:
    """Tells the service manager, as sd_notify(3) does; nothing where there is none."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]  # abstract
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.connect(address)
            channel.sendall(state.encode())
    except OSError as error:
        log.warning("the service manager can't be told %s: %s", state, error.strerror)


def notify_ready() -> None:
    """Says that the service is ready: to the service manager, and as one line on standard output."""
    notify("READY=1")
    print("ready", flush=True)


async def run_until_signal(serve: Callable[[], Awaitable[None]]) -> None:
    """Runs `serve` until it returns, or SIGTERM or SIGINT cancels it; what it has to finish it shields.

    A reader of standard output that left, or a terminal that is gone, is no reason to end.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # what the receiver puts back: a second signal doesn't kill
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:

            async def stop() -> None:
                async for number in signals:
                    log.info("%s: stopping", signal.Signals(number).name)
                    notify("STOPPING=1")
                    nursery.cancel_scope.cancel()
                    return

            nursery.start_soon(stop)
            await serve()
            nursery.cancel_scope.cancel()
    sys.stdout.flush()
