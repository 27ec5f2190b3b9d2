"""What the shipper answers on its control socket: snapshot, bookmark, status."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec
import trio

from pitfs.errors import PitfsError, UsageError
from pitfs.model.group import check_new_bookmark
from pitfs.model.position import format_instant, whole_second
from pitfs.model.schedule import EVERY_WRITE, Decision
from pitfs.replication.control import requests
from pitfs.replication.phases import Phase
from pitfs.replication.shipper import Shipper
from pitfs.replication.status import InGapError
from pitfs.splitter.messages import SplitterStatus
from pitfs.storage.files import durable_replace, storage_error

BOOKMARKS_FILE: Final = "bookmarks"


class Bookmarks:
    """The names given so far: a bookmark is never moved, and the replica may be out of reach to ask.

    Args:
        state: the group's state directory.
        mark: closes the interval, and names its end.
    """

    def __init__(self, state: str, mark: Callable[[str], Awaitable[SplitterStatus]]) -> None:
        self._path = os.path.join(state, BOOKMARKS_FILE)
        self._mark = mark
        self._naming = trio.Lock()

    async def give(self, name: str) -> requests.BookmarkSet:
        """Names the position of the last write. Raises PitfsError."""
        check_new_bookmark(name)
        async with self._naming:  # of two that give the same name at the same time the second is refused
            known = self._read()
            if name in known:
                raise UsageError(
                    f"bookmark {name!r} exists already: a bookmark is never moved, choose another name"
                )
            with trio.CancelScope(shield=True):  # whoever asked may leave: a name isn't kept without its mark
                # Before the mark: a name that is lost with a crash does less harm than one that is given twice.
                await self._write(known | {name})
                try:
                    splitter = await self._mark(name)
                except PitfsError:
                    await self._write(known)
                    raise
        return requests.BookmarkSet(name, format_instant(splitter.position_time_ns), splitter.seq)

    def _read(self) -> set[str]:
        """Raises PitfsError where the file can't be read, or isn't a list of names."""
        try:
            with open(self._path, encoding="ascii") as file:
                return set(file.read().split())
        except FileNotFoundError:
            return set()
        except OSError as error:
            raise storage_error(error, self._path, "reading the names of bookmarks") from error
        except UnicodeDecodeError as error:
            raise PitfsError(
                f"{self._path}: damaged at byte {error.start}: the names of bookmarks given so far, one a line, should "
                "be there: mend it, or move it away and see to it that no name is given twice"
            ) from error

    async def _write(self, names: set[str]) -> None:
        content = "".join(f"{name}\n" for name in sorted(names))
        try:
            await trio.to_thread.run_sync(durable_replace, self._path, content.encode("ascii"))
        except OSError as error:
            raise storage_error(error, self._path, "remembering the bookmark's name") from error


class ShipperControl:
    """Answers requests about one group.

    Args:
        state: the group's state directory.
    """

    def __init__(self, shipper: Shipper, state: str, group: str) -> None:
        self._shipper, self._group = shipper, group
        self._bookmarks = Bookmarks(state, shipper.mark)

    async def handle(self, request: requests.ShipperRequest) -> msgspec.Struct | dict[str, Any]:
        """Answers one request. Raises PitfsError."""
        match request:
            case requests.ReadStatus():
                return await self.status(time.time_ns())
            case requests.TakeSnapshot():
                return await self._snapshot()
            case requests.SetBookmark(name):
                return await self._bookmarks.give(name)

    async def _snapshot(self) -> requests.SnapshotTaken:
        splitter = await self._shipper.mark()
        self._shipper.digests.wanted_mark = splitter.mark
        instant = format_instant(splitter.position_time_ns)
        try:
            await self._shipper.status.wait_committed(splitter.mark, requests.SNAPSHOT_GRACE_S)
        except InGapError as error:
            raise PitfsError(
                f"{self._group}: the snapshot {instant} lies in a gap ({error}): the replica got a full "
                "sync of a later state instead: take another snapshot"
            ) from error
        except PitfsError as error:
            since = self._link_down_since(time.time_ns())
            raise PitfsError(
                f"{self._group}: the snapshot {instant} is set but not on the replica yet: {error}"
                f"{f' (down since {whole_second(since)})' if since else ''}; it is sent as soon as that is "
                "mended: mend the link, or what that says; pitfs status and the replica's log say more"
            ) from error
        return requests.SnapshotTaken(instant, splitter.seq, splitter.mark)

    def _link_down_since(self, now_ns: int) -> str | None:
        down_s = self._shipper.status.link_down_s
        return None if down_s is None else format_instant(now_ns - round(down_s * 1e9))

    async def status(self, now_ns: int) -> dict[str, Any]:
        """The keys of INTERFACE: status --json, and more."""
        shipper, status, splitter = self._shipper, self._shipper.status, await self._shipper.splitter.status()
        committed, location = status.committed, status.committed_location
        protected = committed.protected_through_ns if committed and committed.mark else None
        lag_bytes = splitter.used_bytes
        if location is not None:
            lag_bytes = shipper.bytes_between(location, splitter.tail)
        shipping = status.mode.reason if status.link == "connected" else "waits for the link"
        rate, intake, decision = shipper.bandwidth.rate, shipper.bandwidth.intake, status.last_decision
        if status.phase is Phase.STREAMING:
            shipping, decision = "streaming", Decision(EVERY_WRITE, f"streaming: {status.mode.reason}")
        return {
            "role": "production",
            "group": self._group,
            "protected_through": format_instant(protected) if protected else None,
            "lag_bytes": lag_bytes,
            "lag_seconds": round(max(0, now_ns - protected) / 1e9, 3) if protected else None,
            "backfill_intervals": len(shipper.backfill.waiting),
            "lag_intervals": splitter.mark - (committed.mark if committed else 0),
            "journal_bytes": splitter.used_bytes,
            "journal_capacity_bytes": splitter.capacity_bytes,
            "rate_bytes_per_s": rate if rate is None else round(rate),
            "intake_bytes_per_s": intake if intake is None else round(intake),
            "last_decision": decision,
            "holders": [],
            "seq": splitter.seq,
            "link": status.link,
            "link_down_since": self._link_down_since(now_ns),
            "mode": shipper.settings.mode,
            "shipping": shipping,
            "sync": splitter.sync,
            "passing": splitter.bypass_cause or None,
            "writes_waiting": splitter.waiting_count or None,
            "changed_bytes": splitter.changed_bytes,
            "copying": splitter.copy is not None,
            "copying_bytes": splitter.copy.changed_bytes if splitter.copy is not None else None,
        }
