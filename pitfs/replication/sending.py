"""A transfer's frames on their way: made in threads, sent, measured, put off where something else goes first."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import Final

import trio

from pitfs.errors import RemoteProtocolError
from pitfs.link.sessions.connect import SenderSession
from pitfs.model.transfer import MAX_PAYLOAD_BYTES, Checkpoint, Data, End, ResumePoint, TransferFrame
from pitfs.replication.status import ReplicationStatus

BATCH_BYTES: Final = 4 << 20  # frames made for each hop to a thread
MEASURABLE_BYTES: Final = 4 << 20  # smaller transfers measure delay, not rate
# What is handed over can't be put off any more: on a slow link it must not be more than it carries in that time.
AHEAD_S: Final = 0.5
MIN_PAYLOAD_BYTES: Final = 64 << 10  # a block at least


def payload_bytes_for(rate_bytes_per_s: float | None) -> int:
    """How long frames may be."""
    if rate_bytes_per_s is None:
        return MAX_PAYLOAD_BYTES
    return int(min(max(rate_bytes_per_s * AHEAD_S / 4, MIN_PAYLOAD_BYTES), MAX_PAYLOAD_BYTES))


def queue_bytes_for(rate_bytes_per_s: float | None) -> int:
    """What may wait before compression, and as much behind it: with what is in between all of AHEAD_S."""
    frames = 4 if rate_bytes_per_s is None else 1
    return frames * payload_bytes_for(rate_bytes_per_s)


async def send(
    session: SenderSession,
    iterator: Iterator[TransferFrame],
    standing: ReplicationStatus,
    *,
    batch_bytes: int = BATCH_BYTES,
    interrupted: Callable[[], Awaitable[bool]] | None = None,
    on_durable: Callable[[ResumePoint], Awaitable[None]] | None = None,
) -> bool:
    """Sends a transfer's frames to its end; False where it was put off.

    Args:
        interrupted: whether something else goes first, asked between frames; it may itself stream in between.
        on_durable: told what is durable on the replica, now and then.
    """
    begun, wire, payload = trio.current_time(), session.wire_bytes, session.payload_bytes
    durable = session.durable
    complete = False
    while not complete:
        for frame in await trio.to_thread.run_sync(_pull, iterator, batch_bytes):
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
        standing.rates.append(sent / max(elapsed, 1e-3))
        standing.wire_ratio = (session.wire_bytes - wire) / sent
    return True


def check_committed(session: SenderSession, mark: int, position: tuple[int, int]) -> None:
    """Whether the replica acknowledged what was sent: what it has is given back here.

    Raises:
        RemoteProtocolError: it names something else.
    """
    said = session.welcome
    if (said.mark, said.seq, said.time_ns) != (mark, *position):
        raise RemoteProtocolError(
            f"{session.peer}: it acknowledges mark {said.mark} at seq {said.seq}, mark {mark} at seq {position[0]} was "
            "sent: is that a replica of pitfs?"
        )


def _pull(iterator: Iterator[TransferFrame], batch_bytes: int) -> list[TransferFrame]:
    """Some frames, made in a thread; the last list of a transfer ends with End."""
    frames: list[TransferFrame] = []
    size = 0
    for frame in iterator:
        frames.append(frame)
        size += len(frame.payload) if isinstance(frame, Data) else 0
        if size >= batch_bytes or isinstance(frame, End):
            break
    return frames
