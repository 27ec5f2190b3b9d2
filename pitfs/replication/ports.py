"""What the shipper is given: settings, and a session of the link. (Of the splitter it has a `SplitterClient`.)"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class ShipperSettings:
    """What the shipper of a group is started with.

    Attributes:
        peer: HOST:PORT of the replica, for messages.
        journal_directory, capacity_bytes: of the local journal.
        backings: of each volume, in the order of Hello.volumes.
        mode: sync | async | snapshot | dynamic.
        rate_bytes_per_s: cap on what goes out, None for none.
    """

    peer: str
    journal_directory: str
    capacity_bytes: int
    backings: tuple[str, ...]
    mode: str
    interval_ns: int
    rate_bytes_per_s: int | None

    @property
    def interval_s(self) -> float:
        return self.interval_ns / 1e9


class Session(Protocol):
    """A session with the replica; see `link.sessions.sender.SenderSession`, which also says what each call raises."""

    peer: str
    welcome: Welcome
    durable: ResumePoint
    failure: Exception | None
    on_progress: Callable[[ResumePoint], None] | None
    on_durable: Callable[[Durable], None] | None

    @property
    def wire_bytes(self) -> int: ...
    @property
    def payload_bytes(self) -> int: ...
    async def begin(self, manifest: Manifest) -> ResumePoint: ...
    async def send(self, frame: Data | Checkpoint) -> None: ...
    async def finish(self, end: End) -> Welcome: ...
    async def park(self) -> ResumePoint: ...
    async def stream(self, writes: Writes | None, flush: Flush, window_bytes: int) -> None: ...
    async def stream_mark(self, mark: StreamMark) -> None: ...
    async def wait_durable(self) -> None: ...


Connect = Callable[[int], AbstractAsyncContextManager[Session]]  # of queue_bytes: what may wait before the socket
