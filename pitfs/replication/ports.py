"""What replication needs of the link; `link.sessions` has it. (The splitter: see `splitter.client`.)"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

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
