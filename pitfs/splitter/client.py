"""The splitter as the shipper sees it: one method for each request of its control socket."""

from __future__ import annotations

from typing import Protocol, TypeVar

import msgspec

from pitfs.model.record import CopyProgress
from pitfs.splitter import messages
from pitfs.splitter.control import SPLITTER_SOCKET, Connection
from pitfs.splitter.messages import SplitterRequest, SplitterStatus

Reply = TypeVar("Reply")


class RequestChannel(Protocol):
    """What requests go through: a `control.Connection`."""

    async def request(self, request: msgspec.Struct, reply_type: type[Reply]) -> Reply: ...

    async def aclose(self) -> None: ...


class SplitterClient:
    """Requests to the splitter, one after the other. Each is answered with the status after it.

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
        return await self._request(messages.ReadStatus())

    async def mark(self, bookmark: str | None = None) -> SplitterStatus:
        """Closes the interval at the last write, and names that position if a bookmark is given."""
        return await self._request(messages.SetMark(bookmark))

    async def copied(self, progress: CopyProgress) -> SplitterStatus:
        """The replica durably has the running copy up to there."""
        return await self._request(messages.Copied(progress))

    async def release(self, segment: int, wanted: int) -> SplitterStatus:
        """Segments before `segment` aren't needed for shipping; those from `wanted` on are kept while there is room."""
        return await self._request(messages.Release(segment, wanted))

    async def rescan(self, cause: str) -> SplitterStatus:
        """Begins a complete copy, with a gap before it; the status has the copy."""
        return await self._request(messages.Rescan(cause))

    async def replicated(self, seq: int, in_step: bool, cause: str = "") -> SplitterStatus:
        """Mode sync: the replica durably has every write up to `seq`; or writes can't rely on it, and why."""
        return await self._request(messages.Replicated(seq, in_step, cause))

    async def wait_for_writes(self, lsn: int) -> SplitterStatus:
        """Returns as soon as the journal has a record behind `lsn`, and after a short time in any case."""
        return await self._request(messages.WaitForWrites(lsn))
