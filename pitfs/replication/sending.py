"""Sends a transfer: frames are made in threads, sent and measured; it is parked where something else goes first."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Final

import trio

from pitfs.model.transfer import Checkpoint, Data, End, Manifest, ResumePoint, TransferFrame
from pitfs.replication.bandwidth import Bandwidth
from pitfs.replication.ports import Session
from pitfs.replication.status import ReplicationStatus

BATCH_BYTES: Final = 4 << 20  # frames made for each hop to a thread
MEASURABLE_BYTES: Final = 4 << 20  # smaller transfers measure delay, not rate


@dataclass(frozen=True, slots=True)
class Sender:
    """Sends transfers of one group; the replica's answers go into `status`, what was measured into `bandwidth`."""

    status: ReplicationStatus
    bandwidth: Bandwidth

    async def begin(self, session: Session, manifest: Manifest) -> ResumePoint:
        """Begins a transfer; returns from where the replica wants it."""
        resume = await session.begin(manifest)
        self.status.transfer_begun()
        return resume

    async def send(
        self,
        session: Session,
        frames: Iterator[TransferFrame],
        *,
        interrupted: Callable[[], Awaitable[bool]] | None = None,
        on_durable: Callable[[ResumePoint], Awaitable[None]] | None = None,
    ) -> bool:
        """Sends a transfer's frames to its end; False where it was parked.

        Args:
            interrupted: whether something else goes first, asked between frames; it may itself stream in between.
            on_durable: called now and then with what is durable on the replica.
        """
        begun, wire, payload = trio.current_time(), session.wire_bytes, session.payload_bytes
        busy_s = session.busy_s
        durable, complete = session.durable, False
        batch_bytes = min(BATCH_BYTES, 4 * self.bandwidth.payload_bytes)
        while not complete:
            for frame in await trio.to_thread.run_sync(_pull, frames, batch_bytes):
                if interrupted is not None and not isinstance(frame, End) and await interrupted():
                    await session.park()
                    return False
                if isinstance(frame, End):
                    await session.finish(frame)
                    complete = True
                elif isinstance(frame, Data | Checkpoint):
                    await session.send(frame)
            if on_durable is not None and session.durable is not durable and not complete:
                durable = session.durable
                await on_durable(durable)
        elapsed, sent = trio.current_time() - begun, session.payload_bytes - payload
        if sent >= MEASURABLE_BYTES:
            self.bandwidth.measured(sent, session.busy_s - busy_s, elapsed)
            self.bandwidth.wire_ratio = (session.wire_bytes - wire) / sent
        return True


def _pull(frames: Iterator[TransferFrame], batch_bytes: int) -> list[TransferFrame]:
    """Some frames, made in a thread; the last one of a transfer is an End."""
    batch: list[TransferFrame] = []
    size = 0
    for frame in frames:
        batch.append(frame)
        size += len(frame.payload) if isinstance(frame, Data) else 0
        if size >= batch_bytes:
            break
    return batch
