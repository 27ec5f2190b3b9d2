"""What the shipper is given: settings, and a session of the link. (Of the splitter it has a `SplitterClient`.)"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from pitfs.model import transfer
from pitfs.splitter.startup import VolumeSpec


@dataclass(frozen=True, slots=True)
class ShipperSettings:
    """What the shipper of a group is started with.

    Attributes:
        hello: who we are.
        peer: HOST:PORT of the replica, for messages.
        journal_directory, capacity_bytes: of the local journal.
        configured: reads what the configuration says of the volumes now.
        mode: sync | async | snapshot | dynamic.
        rate_bytes_per_s: cap on what goes out, None for none.
    """

    hello: transfer.Hello
    peer: str
    journal_directory: str
    capacity_bytes: int
    configured: Callable[[], Sequence[VolumeSpec]]
    mode: str
    interval_ns: int
    rate_bytes_per_s: int | None

    @property
    def block_sizes(self) -> list[int]:
        return [volume.block_size for volume in self.hello.volumes]

    @property
    def interval_s(self) -> float:
        return self.interval_ns / 1e9


class Session(Protocol):
    """A session with the replica; see `link.sessions.sender.SenderSession`, which also says what each call raises."""

    peer: str
    welcome: transfer.Welcome
    durable: transfer.ResumePoint
    failure: Exception | None
    on_progress: Callable[[transfer.ResumePoint], None] | None
    on_durable: Callable[[transfer.Durable], None] | None

    @property
    def wire_bytes(self) -> int: ...
    @property
    def payload_bytes(self) -> int: ...
    @property
    def busy_s(self) -> float: ...
    async def begin(self, manifest: transfer.Manifest) -> transfer.ResumePoint: ...
    async def send(self, frame: transfer.Data | transfer.Checkpoint) -> None: ...
    async def finish(self, end: transfer.End) -> transfer.Welcome: ...
    async def park(self) -> transfer.ResumePoint: ...
    async def stream(self, writes: transfer.Writes | None, flush: transfer.Flush, window_bytes: int) -> None: ...
    async def stream_mark(self, mark: transfer.StreamMark) -> None: ...
    async def wait_durable(self) -> None: ...
    def answer_wants(self, find: transfer.FindContents) -> None: ...


Connect = Callable[[int], AbstractAsyncContextManager[Session]]  # of queue_bytes: what may wait before the socket
