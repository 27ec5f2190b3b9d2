"""Asking the processes of a running `pitfs protect`."""

from __future__ import annotations

import os
from typing import Any, Final

import msgspec
import trio

from pitfs.config.production import Config
from pitfs.errors import PitfsError, UsageError
from pitfs.splitter import control

STARTING_S: Final = 10.0  # the shipper answers some time after writes are accepted
POLL_S: Final = 0.1


def ask(config: Config, request: msgspec.Struct) -> dict[str, Any]:
    """Sends one request to the group's shipper.

    Raises:
        PitfsError: `pitfs protect` isn't running, or it says so.
    """

    async def send() -> dict[str, Any]:
        name = config.group.name
        hint = f"{name}: 'pitfs protect {config.path}' isn't running"
        try:
            connection = await _connect(config)
        except FileNotFoundError:
            if os.path.isdir(config.group.state):
                raise PitfsError(f"{hint}: start it first") from None
            raise UsageError(f"{config.group.state}: no such state directory: {hint}") from None
        except OSError as error:
            raise PitfsError(f"{hint} ({os.strerror(error.errno or 0)}): start it first") from None
        try:
            return await connection.request(request, dict[str, Any])
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise PitfsError(
                f"{name}: the shipper ended before it answered: see the log of 'pitfs protect'"
            ) from None
        finally:
            await connection.aclose()

    return trio.run(send)


async def _connect(config: Config) -> control.Connection:
    """A connection to the shipper, as soon as it answers if `pitfs protect` has just started it.

    Raises:
        OSError: nothing of the group runs.
        PitfsError: the splitter does, the shipper doesn't.
    """
    state = config.group.state
    deadline = trio.current_time() + STARTING_S
    while True:
        try:
            return await control.Connection.open(state, control.SHIPPER_SOCKET)
        except (FileNotFoundError, ConnectionRefusedError):
            try:
                await (await control.Connection.open(state, control.SPLITTER_SOCKET)).aclose()
            except OSError:
                splitting = False
            else:
                splitting = True
            if not splitting:
                raise
            if trio.current_time() > deadline:
                raise PitfsError(
                    f"{config.group.name}: writes are journalled, but the shipper doesn't run: see the log of "
                    f"'pitfs protect {config.path}'"
                ) from None
        await trio.sleep(POLL_S)
