"""The splitter's control socket: its requests, the status that answers each of them, and the client that sends them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Final, Protocol, TypeVar

import msgspec

from pitfs.errors import PitfsError, UsageError
from pitfs.journal.writer import Location
from pitfs.model.record import CopyProgress
from pitfs.model.transfer import VolumeInfo
from pitfs.splitter.control import SPLITTER_SOCKET, Connection, ControlError
from pitfs.splitter.startup import VolumeSpec
from pitfs.storage.files import closed_on_error, file_identity

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


class Backings:
    """The backing volumes as the running splitter has them: a copy reads the very files that the splitter writes.

    A path proves nothing: the configuration may have been edited, or another file put there, since the splitter began.
    So each volume is opened through the splitter's own descriptor, and must be the file that the splitter says it is.

    Args:
        volumes: of the group, in order. configured: reads what the configuration says of them; not again, once that
            was right, since a file may be edited for the next start.
    """

    def __init__(
        self, splitter: SplitterClient, volumes: Sequence[VolumeInfo], configured: Callable[[], Sequence[VolumeSpec]]
    ) -> None:
        self._splitter, self._volumes, self._configured = splitter, volumes, configured
        self._right: list[str] | None = None

    async def check(self) -> None:
        """Raises UsageError where the configuration isn't that of the running splitter, or the splitter's version."""
        await self._running()

    async def open(self, stack: contextlib.ExitStack) -> list[int]:
        """Descriptors for reading, of each volume in order, closed by the stack. Raises as `check`, and OSError."""
        fds = []
        for backing in await self._running():
            fds.append(_open(backing))
            stack.callback(os.close, fds[-1])
        return fds

    async def _running(self) -> list[Backing]:
        try:
            running = [await self._splitter.backing(index) for index in range(len(self._volumes))]
        except ControlError as error:
            raise UsageError(
                f"the running splitter is of another version of pitfs ({error}): restart 'pitfs protect'; until then "
                "nothing is sent"
            ) from error
        have = [f"{each.name} on {each.path} in blocks of {each.block_size}" for each in running]
        if have != self._right:
            specs = self._configured()
            configured = [f"{each.name} on {each.backing} in blocks of {each.block_size}" for each in specs]
            if configured != have:
                raise UsageError(
                    f"the configuration was changed: {_difference(configured, have)}: restart 'pitfs protect', or undo "
                    "the change; until then nothing is sent"
                )
            self._right = have
        return running


def _difference(configured: list[str], running: list[str]) -> str:
    """What two lists of volumes don't have in common; the lists where only their order differs."""
    only = [each for each in configured if each not in running], [each for each in running if each not in configured]
    if not any(only):
        only = configured, running
    sides = zip(("the file has", "the running splitter has"), only, strict=True)
    return ", ".join(f"{side} {'; '.join(volumes)}" for side, volumes in sides if volumes)


def _open(backing: Backing) -> int:
    """Raises PitfsError where it isn't the file that the splitter has, OSError where it can't be opened."""
    # Not by the path: the file may have been renamed or removed meanwhile.
    with closed_on_error(os.open(f"/proc/{backing.pid}/fd/{backing.fd}", os.O_RDONLY | os.O_CLOEXEC)) as fd:
        if file_identity(fd) != backing.identity:
            raise PitfsError(f"{backing.path}: another splitter has it since: it is opened anew")
    return fd
