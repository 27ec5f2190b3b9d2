"""Requests to the shipper of a running `pitfs protect`."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any, Final

import msgspec
import trio

from pitfs.cli.common.output import warn
from pitfs.config.production import Config, load_config
from pitfs.errors import PermissionDeniedError, PitfsError, UsageError
from pitfs.model.position import whole_second
from pitfs.replication.control.requests import SNAPSHOT_GRACE_S, ReadStatus, TakeSnapshot
from pitfs.splitter import control

STARTING_S: Final = 10.0  # the shipper answers some time after writes are accepted
POLL_S: Final = 0.1
SAY_S: Final = 0.3  # an answer that comes sooner needs no words


def ask_shipper(config_path: str, request: msgspec.Struct) -> dict[str, Any]:
    """Sends one request (replication/control/requests.py) to the shipper of the group of CONFIG; returns the reply.

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
        if isinstance(request, TakeSnapshot) and sys.stderr.isatty():
            return await _wait_aloud(connection, request, config.group.state)
        return await connection.request(request, dict[str, Any])
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        raise PitfsError(f"{name}: the shipper ended before it answered: see the log of 'pitfs protect'") from None
    finally:
        await connection.aclose()


async def _wait_aloud(connection: control.Connection, request: TakeSnapshot, state: str) -> dict[str, Any]:
    """The reply; meanwhile says on standard error, once, that the link is down."""
    reply: dict[str, Any] = {}
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_say_when_the_link_is_down, state)
        try:
            reply = await connection.request(request, dict[str, Any])
        except (PitfsError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            failure = error  # raised outside, where it isn't part of a group
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return reply


async def _say_when_the_link_is_down(state: str) -> None:
    with contextlib.suppress(OSError, PitfsError, trio.BrokenResourceError):  # what waits for the reply says it
        async with contextlib.aclosing(await control.Connection.open(state, control.SHIPPER_SOCKET)) as connection:
            status: dict[str, Any] = {}
            while not status.get("link_down_since"):
                await trio.sleep(SAY_S)
                status = await connection.request(ReadStatus(), dict[str, Any])
        warn(
            f"{status['group']}: the link is down since {whole_second(status['link_down_since'])} "
            f"({status['link']}): it waits {SNAPSHOT_GRACE_S:g} s for it"
        )


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
