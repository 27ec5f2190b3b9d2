"""The shipper's process, started and minded by `pitfs protect`: intervals, difference, link, status.

Started as `python -m pitfs.supervision.shipper_process CONFIG`. It may be killed at any time: what it missed is in
the local journal.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import Any, Final

import trio

from pitfs.config.production import Config
from pitfs.errors import PitfsError, UsageError
from pitfs.link.transport.tls import LinkContext
from pitfs.model.position import format_instant
from pitfs.model.transfer import Hello
from pitfs.replication.requests import (
    REQUESTS,
    BookmarkSet,
    ReadStatus,
    SetBookmark,
    ShipperRequest,
    SnapshotTaken,
    TakeSnapshot,
)
from pitfs.replication.shipper import Shipper
from pitfs.replication.status import InGapError
from pitfs.splitter import control
from pitfs.splitter.client import SplitterClient
from pitfs.splitter.identity import next_epoch, read_group
from pitfs.storage.files import durable_replace, storage_error
from pitfs.supervision.heap import bound_heap
from pitfs.supervision.processes import (
    link_context,
    run_process,
    set_process_name,
    told_to_stop,
    trim_heap,
)

log = logging.getLogger(__name__)

NICENESS: Final = 10  # production first: the splitter, and what writes through it, go before
SNAPSHOT_GRACE_S: Final = 10.0  # how long `pitfs snapshot` waits for a link that is down
BOOKMARKS_FILE: Final = "bookmarks"


def _read_bookmarks(state: str) -> set[str]:
    """Names given so far: a bookmark is never moved, and the replica may be out of reach to ask.

    Raises:
        PitfsError: the file can't be read, or isn't a list of names.
    """
    path = os.path.join(state, BOOKMARKS_FILE)
    try:
        with open(path, encoding="ascii") as file:
            return set(file.read().split())
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise storage_error(error, path, "reading the names of bookmarks") from error
    except UnicodeDecodeError as error:
        raise PitfsError(
            f"{path}: damaged at byte {error.start}: the names of bookmarks given so far, one a line, should be "
            "there: mend it, or move it away and see to it that no name is given twice"
        ) from error


class ShipperControl:
    """Answers `control.sock`: snapshot, bookmark NAME, status."""

    def __init__(self, shipper: Shipper, state: str, group: str) -> None:
        self._shipper = shipper
        self._state = state
        self._group = group
        self._naming = trio.Lock()

    async def handle(self, request: ShipperRequest) -> SnapshotTaken | BookmarkSet | dict[str, Any]:
        """Answers one request. Raises PitfsError."""
        match request:
            case ReadStatus():
                return await self._shipper.status(time.time_ns())
            case TakeSnapshot():
                return await self._snapshot()
            case SetBookmark(name):
                return await self._bookmark(name)

    async def _snapshot(self) -> SnapshotTaken:
        status = await self._shipper.mark()
        instant = format_instant(status.position_time_ns)
        try:
            await self._shipper.standing.wait_committed(status.mark, SNAPSHOT_GRACE_S)
        except InGapError as error:
            raise PitfsError(
                f"{self._group}: the snapshot {instant} lies in a gap ({error}): the replica got a complete "
                "copy of a later state instead: take another snapshot"
            ) from error
        except PitfsError as error:
            raise PitfsError(
                f"{self._group}: the snapshot {instant} is set but not on the replica yet: {error}; "
                "it is sent as soon as the replica can be reached"
            ) from error
        return SnapshotTaken(instant, status.seq, status.mark)

    async def _bookmark(self, name: str) -> BookmarkSet:
        async with self._naming:  # of two that give the same name at the same time the second is refused
            known = _read_bookmarks(self._state)
            if name in known:
                raise UsageError(
                    f"bookmark {name!r} exists already: a bookmark is never moved, choose another name"
                )
            with trio.CancelScope(shield=True):  # whoever asked may leave: a name isn't kept without its mark
                # Before the mark: a name that is lost with a crash does less harm than one that is given twice.
                await self._write_bookmarks(known | {name})
                try:
                    status = await self._shipper.mark(name)
                except PitfsError:
                    await self._write_bookmarks(known)
                    raise
        return BookmarkSet(name, format_instant(status.position_time_ns), status.seq)

    async def _write_bookmarks(self, names: set[str]) -> None:
        path, content = os.path.join(self._state, BOOKMARKS_FILE), "".join(f"{name}\n" for name in sorted(names))
        try:
            await trio.to_thread.run_sync(durable_replace, path, content.encode("ascii"))
        except OSError as error:
            raise storage_error(error, path, "remembering the bookmark's name") from error


async def _main(config: Config, hello: Hello, tls: LinkContext | None) -> None:
    state = config.group.state
    try:
        splitter = await SplitterClient.open(state)
        follower = await SplitterClient.open(state)
    except OSError as error:
        raise PitfsError(f"{state}: the splitter isn't running: {os.strerror(error.errno or 0)}") from error
    shipper = Shipper(config, hello, splitter, follower, tls)
    handler = ShipperControl(shipper, state, config.group.name)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_stop_when_told, nursery.cancel_scope)
            await nursery.start(control.serve, state, control.SHIPPER_SOCKET, REQUESTS.decode, handler.handle)
            nursery.start_soon(shipper.tick)
            nursery.start_soon(shipper.watch)
            nursery.start_soon(shipper.run)
            nursery.start_soon(shipper.telling.run)
            nursery.start_soon(trim_heap)
            print("ready", flush=True)
    except* trio.BrokenResourceError:
        raise PitfsError(f"{state}: the splitter ended") from None


async def _stop_when_told(scope: trio.CancelScope) -> None:
    await told_to_stop()
    scope.cancel()


def serve(config: Config) -> int:
    """Ships until SIGTERM; returns the exit code."""
    set_process_name("pitfs-shipper")
    if config.replication.mode != "sync":  # there writes wait for it
        os.nice(NICENESS)
    bound_heap()
    group = read_group(config.group.state)
    if group is None:
        raise UsageError(f"{config.group.state}: no state of a group: it is made by 'pitfs protect'")
    tls = link_context(config)
    epoch = next_epoch(config.group.state, time.time_ns() // 1_000_000)
    hello = Hello(group.group, group.history, group.volumes, epoch.epoch, epoch.instance)
    trio.run(_main, config, hello, tls)
    return 0


if __name__ == "__main__":
    sys.exit(run_process(serve))
