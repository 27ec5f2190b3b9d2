"""What an fsync waits for: one sync of the journal for all that wait."""

from __future__ import annotations

import time
from typing import Final

import trio

from pitfs.splitter.splitter import Splitter

# An fsync that takes less than this on average is done in the event loop: a thread's wake-up costs 150 to
# 300 µs, and no request waits longer than a millisecond for it.
INLINE_SYNC_NS: Final = 1_000_000
INLINE_SYNC_BYTES: Final = 256 << 10


class GroupCommit:
    """Each fsync waits for a sync that begins after its arrival; fsyncs that wait share one."""

    def __init__(self, splitter: Splitter) -> None:
        self._splitter = splitter
        self._lock = trio.Lock()
        self._average_ns = 2.0 * INLINE_SYNC_NS  # of late, each new sync counts for an eighth; slow until known

    def sync_now(self) -> bool:
        """Syncs at once if that is short and no other sync is under way; False: call `sync`. Raises OSError.

        It isn't short while the backing volumes are being synced, nor after a roll, whose rename must be durable.

        It has no await, since each one costs a turn of the event loop, as much as the sync itself.
        """
        journal, checkpoints = self._splitter.journal, self._splitter.checkpoints
        if (
            self._splitter.state.bypass_cause
            or not checkpoints.is_settled
            or self._lock.locked()
            or journal.syncing
            or journal.has_rolled
            or checkpoints.is_syncing
            or self._average_ns >= INLINE_SYNC_NS
            or journal.unsynced_bytes > INLINE_SYNC_BYTES
        ):
            return False
        if journal.unsynced_bytes:
            self._sync()
        return True

    async def sync(self) -> None:
        """Returns when every write that was answered before the call is durable. Raises OSError."""
        splitter = self._splitter
        target = splitter.journal.appended_bytes
        async with self._lock:
            if splitter.state.bypass_cause or not splitter.checkpoints.is_settled:
                await trio.to_thread.run_sync(splitter.sync)
            elif splitter.journal.synced_bytes < target:
                await trio.to_thread.run_sync(self._sync)

    def _sync(self) -> None:
        start = time.monotonic_ns()
        try:
            self._splitter.sync()
        finally:
            self._average_ns += (time.monotonic_ns() - start - self._average_ns) / 8
