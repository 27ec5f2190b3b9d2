"""Asking the processes of a running `pitfs protect`."""

from __future__ import annotations

import os
from typing import Any

import trio

from pitfs.config import Config
from pitfs.errors import PitfsError, UsageError
from pitfs.production import control


def ask(config: Config, op: str, **arguments: Any) -> dict[str, Any]:
    """Sends one request to the group's shipper.

    Raises:
        PitfsError: `pitfs protect` isn't running, or it says so.
    """

    async def request() -> dict[str, Any]:
        name = config.group.name
        hint = f"{name}: 'pitfs protect {config.path}' isn't running"
        try:
            connection = await control.Connection.open(config.group.state, control.SHIPPER_SOCKET)
        except FileNotFoundError:
            if os.path.isdir(config.group.state):
                raise PitfsError(f"{hint}: start it first") from None
            raise UsageError(f"{config.group.state}: no such state directory: {hint}") from None
        except OSError as error:
            raise PitfsError(f"{hint} ({os.strerror(error.errno or 0)}): start it first") from None
        try:
            return await connection.request(op, **arguments)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise PitfsError(
                f"{name}: the shipper ended before it answered: see the log of 'pitfs protect'"
            ) from None
        finally:
            await connection.aclose()

    return trio.run(request)
