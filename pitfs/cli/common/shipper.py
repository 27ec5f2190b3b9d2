"""Requests to the shipper of a running `pitfs protect`."""

from __future__ import annotations

import os
from typing import Any, Final

import msgspec
import trio

from pitfs.config.production import Config, load_config
from pitfs.errors import PermissionDeniedError, PitfsError, UsageError
from pitfs.splitter import control

STARTING_S: Final = 10.0  # the shipper answers some time after writes are accepted
POLL_S: Final = 0.1


def ask_shipper(config_path: str, request: msgspec.Struct) -> dict[str, Any]:
    """Sends one request (replication/requests.py) to the shipper of the group of CONFIG; returns the reply.

    Raises:
        PermissionDeniedError: this user may not ask it.
        PitfsError: `pitfs protect` is not running, or it refuses the request.
    """
    return trio.run(_ask, load_config(config_path), request)


async def _ask(config: Config, request: msgspec.Struct) -> dict[str, Any]:
    name = config.group.name
    hint = f"{name}: 'pitfs protect {config.path}' isn't running"
    try:
        connection = await _connect(config)
    except PermissionError:
        raise PermissionDeniedError(config.group.state) from None
    except FileNotFoundError:
        if os.path.isdir(config.group.state):
            raise PitfsError(f"{hint}: start it first") from None
        raise UsageError(f"{config.group.state}: no such state directory: {hint}") from None
    except OSError as error:
        raise PitfsError(f"{hint} ({os.strerror(error.errno or 0)}): start it first") from None
    try:
        return await connection.request(request, dict[str, Any])
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        raise PitfsError(f"{name}: the shipper ended before it answered: see the log of 'pitfs protect'") from None
    finally:
        await connection.aclose()


async def _connect(config: Config) -> control.Connection:
    """A connection to the shipper. Waits for it while `pitfs protect` is just starting it.

    Raises:
        OSError: no process of the group runs.
        PitfsError: the splitter runs, the shipper does not.
    """
    state = config.group.state
    deadline = trio.current_time() + STARTING_S
    while True:
        try:
            return await control.Connection.open(state, control.SHIPPER_SOCKET)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            try:
                await (await control.Connection.open(state, control.SPLITTER_SOCKET)).aclose()
            except OSError:
                raise error from None
            if trio.current_time() > deadline:
                raise PitfsError(
                    f"{config.group.name}: writes are journalled, but the shipper doesn't run: see the log of "
                    f"'pitfs protect {config.path}'"
                ) from None
        await trio.sleep(POLL_S)
