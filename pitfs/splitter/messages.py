"""The splitter's control socket: its requests, the status that answers each of them, and the client that sends them."""

from __future__ import annotations

from typing import Final, Protocol, TypeVar

import msgspec

from pitfs.journal.writer import Location
from pitfs.model.record import CopyProgress
from pitfs.splitter.control import SPLITTER_SOCKET, Connection

Reply = TypeVar("Reply")


class RunningCopy(msgspec.Struct, frozen=True):
    """The copy under way: its mark, where its COPY_START is, and for a copy of changes the bytes that it copies."""

    mark: int
    location: Location
    changed_bytes: int | None


class SplitterStatus(msgspec.Struct, frozen=True):
    """The splitter's state when it answered.

    Attributes:
        tail: where the journal goes on; lsn: of its last record.
        seq, position_time_ns: position of the last write.
        mark: the last mark, which is the one just set where a mark was requested.
        now_ns: no later write has a time up to this one, nor has any that bypassed the journal.
        used_bytes, capacity_bytes: of the journal.
        bypass_cause: why writes bypass the journal, empty while they are journalled.
        changed_bytes: what a bypass has written so far; None while writes are journalled or where it isn't known.
        waiting_count: writes that wait for room in the journal or for the replica.
        copy: None if none is under way.
        sync: what mode sync does now, for people; None in other modes.
        given_up_seq: writes up to that one that were wanted for backfill were given up, since room was needed.
    """

    tail: Location
    lsn: int
    seq: int
    position_time_ns: int
    mark: int
    now_ns: int
    used_bytes: int
    capacity_bytes: int
    bypass_cause: str
    changed_bytes: int | None
    waiting_count: int
    copy: RunningCopy | None
    sync: str | None
    given_up_seq: int = 0  # a splitter of an older version doesn't say


class Backing(msgspec.Struct, frozen=True):
    """A backing volume as the splitter has it open: descriptor `fd` of process `pid`.

    Attributes:
        identity: (st_dev, st_ino, st_rdev) of the file or device.
    """

    name: str
    block_size: int
    path: str
    pid: int
    fd: int
    identity: tuple[int, int, int]


class _Request(msgspec.Struct, frozen=True, tag=True, tag_field="op"):
    """A request; the method of `SplitterClient` that sends it says what it does."""


class ReadStatus(_Request, frozen=True):
    pass


class ReadBacking(_Request, frozen=True):
    index: int


class SetMark(_Request, frozen=True):
    bookmark: str | None


class Copied(_Request, frozen=True):
    progress: CopyProgress


class Release(_Request, frozen=True):
    segment: int
    wanted: int


class Rescan(_Request, frozen=True):
    cause: str


class Replicated(_Request, frozen=True):
    seq: int
    in_step: bool
    cause: str


class WaitForWrites(_Request, frozen=True):
    lsn: int


SplitterRequest = ReadStatus | ReadBacking | SetMark | Copied | Release | Rescan | Replicated | WaitForWrites
REQUESTS: Final[msgspec.json.Decoder[SplitterRequest]] = msgspec.json.Decoder(SplitterRequest)


class RequestChannel(Protocol):
    """What requests go through: a `control.Connection`."""

    async def request(self, request: msgspec.Struct, reply_type: type[Reply]) -> Reply: ...

    async def aclose(self) -> None: ...


class SplitterClient:
    """Requests to the splitter, one after the other. Each but `backing` is answered with the status after it.

    Every method raises ControlError where the splitter refuses, and trio.BrokenResourceError where it has ended.
    """

    def __init__(self, channel: RequestChannel) -> None:
        self._channel = channel

    @classmethod
    async def open(cls, state: str) -> SplitterClient:
        """Connects to the splitter of a state directory. Raises OSError where none runs."""
        return cls(await Connection.open(state, SPLITTER_SOCKET))

    async def aclose(self) -> None:
        await self._channel.aclose()

    async def _request(self, request: SplitterRequest) -> SplitterStatus:
        return await self._channel.request(request, SplitterStatus)

    async def status(self) -> SplitterStatus:
        return await self._request(ReadStatus())

    async def backing(self, index: int) -> Backing:
        """The backing of the group's volume with that index. A splitter of an older version refuses."""
        return await self._channel.request(ReadBacking(index), Backing)

    async def mark(self, bookmark: str | None = None) -> SplitterStatus:
        """Closes the interval at the last write, and names that position if a bookmark is given."""
        return await self._request(SetMark(bookmark))

    async def copied(self, progress: CopyProgress) -> SplitterStatus:
        """The replica durably has the running copy up to there."""
        return await self._request(Copied(progress))

    async def release(self, segment: int, wanted: int) -> SplitterStatus:
        """Segments before `segment` aren't needed for shipping; those from `wanted` on are kept while there is room."""
        return await self._request(Release(segment, wanted))

    async def rescan(self, cause: str) -> SplitterStatus:
        """Begins a full sync, with a gap before it; the status has the copy."""
        return await self._request(Rescan(cause))

    async def replicated(self, seq: int, in_step: bool, cause: str = "") -> SplitterStatus:
        """Mode sync: the replica durably has every write up to `seq`; or writes can't rely on it, and why."""
        return await self._request(Replicated(seq, in_step, cause))

    async def wait_for_writes(self, lsn: int) -> SplitterStatus:
        """Returns as soon as the journal has a record behind `lsn`, and after a short time in any case."""
        return await self._request(WaitForWrites(lsn))
