"""What replication needs of the link and of the splitter; `link.sessions` and `splitter.client` have it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from pitfs.model.record import CopyProgress
from pitfs.model.transfer import (
    Checkpoint,
    Data,
    Durable,
    End,
    Flush,
    Manifest,
    ResumePoint,
    StreamMark,
    Welcome,
    Writes,
)
from pitfs.splitter.messages import SplitterStatus


class Session(Protocol):
    """A session with the replica; see `link.sessions.sender.SenderSession`, which also says what each call raises."""

    peer: str
    welcome: Welcome
    durable: ResumePoint
    failure: Exception | None
    wire_bytes: int
    payload_bytes: int
    on_progress: Callable[[ResumePoint], None] | None
    on_durable: Callable[[Durable], None] | None

    async def begin(self, manifest: Manifest) -> ResumePoint: ...
    async def send(self, frame: Data | Checkpoint) -> None: ...
    async def finish(self, end: End) -> Welcome: ...
    async def park(self) -> ResumePoint: ...
    async def stream(self, writes: Writes | None, flush: Flush, window_bytes: int) -> None: ...
    async def stream_mark(self, mark: StreamMark) -> None: ...
    async def wait_durable(self) -> None: ...


Connect = Callable[[int], AbstractAsyncContextManager[Session]]  # of queue_bytes: what may wait before the socket


class SplitterPort(Protocol):
    """The splitter's control socket; see `splitter.client.SplitterClient`."""

    async def status(self) -> SplitterStatus: ...
    async def mark(self, bookmark: str | None = None) -> SplitterStatus: ...
    async def copied(self, progress: CopyProgress) -> SplitterStatus: ...
    async def release(self, segment: int, wanted: int | None = None) -> SplitterStatus: ...
    async def rescan(self, cause: str) -> SplitterStatus: ...
    async def replicated(self, seq: int, in_step: bool, cause: str = "") -> SplitterStatus: ...
    async def wait_for_writes(self, lsn: int) -> SplitterStatus: ...
