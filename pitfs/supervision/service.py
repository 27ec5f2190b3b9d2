"""What services share: notes to the service manager, and their end on a signal."""

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
    """Sends a state to the service manager, if there is one, as sd_notify(3) does."""
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
        log.warning("%s can't be sent to the service manager: %s", state, error.strerror)


def notify_ready() -> None:
    """Says that the service is ready: to the service manager, and as one line on standard output."""
    notify("READY=1")
    print("ready", flush=True)


def _do_nothing(number: int, frame: object) -> None:
    """A handler instead of SIG_IGN, which child processes would inherit."""


@contextmanager
def stop_signals() -> Iterator[AsyncIterator[int]]:
    """SIGTERM and SIGINT as they come; after the block they have no effect any more.

    Ctrl-C goes to all processes of a terminal, and the minder also signals its parts: the second signal must not kill
    a process that closes in order because of the first.
    """
    numbers = (signal.SIGTERM, signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # one that comes now waits for the receiver
    for number in numbers:
        signal.signal(number, _do_nothing)  # what the receiver puts back when it ends
    with trio.open_signal_receiver(*numbers) as signals:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
        yield signals


async def next_signal(signals: AsyncIterator[int]) -> str:
    """Waits for one of `stop_signals`; its name."""
    return signal.Signals(await anext(signals)).name


async def cancel_on_signal(scope: trio.CancelScope, *, task_status: trio.TaskStatus[None]) -> None:
    """Cancels the scope on SIGTERM or SIGINT; started when it would hear them."""
    with stop_signals() as signals:
        task_status.started()
        while True:
            log.info("%s: stopping", await next_signal(signals))
            notify("STOPPING=1")
            scope.cancel()


async def run_until_signal(serve: Callable[[], Awaitable[None]]) -> None:
    """Runs `serve` until it returns, or SIGTERM or SIGINT cancels it; `serve` shields what it has to finish.

    A reader of standard output that left, or a terminal that is gone, is no reason to end.
    """
    async with trio.open_nursery() as nursery:
        await nursery.start(cancel_on_signal, nursery.cancel_scope)
        await serve()
        nursery.cancel_scope.cancel()
    sys.stdout.flush()
