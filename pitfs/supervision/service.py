"""What commands that run as services share: telling the service manager, and ending on a signal."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager

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


def _do_nothing(number: int, frame: object) -> None:
    """A handler instead of SIG_IGN, which processes that are started would inherit."""


@contextmanager
def stop_signals() -> Iterator[AsyncIterator[int]]:
    """SIGTERM and SIGINT as they come; once this is left, and for good, they do nothing.

    Ctrl-C goes to all processes of a terminal, and a minder tells its parts as well: the second signal must
    not kill what is closing in order because of the first.
    """
    numbers = (signal.SIGTERM, signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # one that comes now waits for the receiver
    for number in numbers:
        signal.signal(number, _do_nothing)  # what the receiver puts back when it ends
    with trio.open_signal_receiver(*numbers) as signals:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
        yield signals


async def run_until_signal(serve: Callable[[], Awaitable[None]]) -> None:
    """Runs `serve` until it returns, or SIGTERM or SIGINT cancels it; what it has to finish it shields.

    A reader of standard output that left, or a terminal that is gone, is no reason to end.
    """
    with stop_signals() as signals:
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
