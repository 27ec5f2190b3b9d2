"""Checkpoints: syncing the backing volumes, and then saying durably from where a redo would begin.

Some checkpoints must be durable before the next write is done: the first one of a bypass, as a redo of older writes
would destroy newer ones, and the one that ends it, as a redo must do the newer ones again. The event loop, which takes
them (`Splitter.snapshot_progress`), doesn't wait for a disk: it `require`s such a checkpoint, and a thread makes it
durable by `settle`. Until it `is_settled` no write is done, and an fsync settles first.
"""

from __future__ import annotations

import os
import threading

from pitfs.journal.writer import Journal
from pitfs.splitter.state import Progress, ProgressFile
from pitfs.splitter.volume import Volume


class Checkpoints:
    """The checkpoints of a group. `require` and `is_settled` are the event loop's, all else runs in any thread.

    Attributes:
        recovery_segment: where a recovery would begin to read.
    """

    def __init__(self, volumes: list[Volume], journal: Journal, file: ProgressFile) -> None:
        self._volumes, self._journal, self._file = volumes, journal, file
        self.recovery_segment = 0
        self._required: Progress | None = None
        self._durable_generation = 0
        self._failed: OSError | None = None  # of the fdatasync of a backing volume that failed
        self._syncing = threading.Lock()  # of two syncs at a time, the kernel would report a failure to one alone
        self._writing = threading.Lock()  # of two checkpoints, the one that ends last isn't always the later one
        self._settling = threading.Lock()

    @property
    def is_syncing(self) -> bool:
        """Whether a thread syncs backing volumes: other syncs may take long meanwhile."""
        return self._syncing.locked()

    @property
    def is_settled(self) -> bool:
        """Whether the checkpoint is durable that was required last."""
        return self._required is None or self._durable_generation >= self._required.generation

    def require(self, progress: Progress) -> None:
        """Writes wait from now on until this checkpoint, or a later one, is durable."""
        self._required = progress

    def settle(self) -> None:
        """Makes the required checkpoint durable, unless it is. Blocks. Raises OSError; the next call tries again."""
        with self._settling:
            required = self._required
            if required is not None and self._durable_generation < required.generation:
                self.write(required)

    def sync_backings(self) -> None:
        """Blocks until the backing volumes are durable. Raises OSError."""
        with self._syncing:
            if self._failed is not None:
                # The kernel reports a failure once and drops the pages: only a redo, at the next start, helps.
                raise self._failed
            for volume in self._volumes:
                try:
                    os.fdatasync(volume.fd)
                except OSError as error:
                    self._failed = OSError(error.errno, error.strerror, volume.path)
                    raise self._failed from error

    def write(self, progress: Progress) -> None:
        """Syncs the backing volumes, then writes `progress`, taken before that. Blocks. Raises OSError."""
        self.sync_backings()
        if not progress.bypass_cause:
            self._journal.sync()  # no recovery is possible from a checkpoint behind the journal's durable end
        with self._writing:
            self._file.write(progress)
            self.recovery_segment = max(self.recovery_segment, progress.recovery_segment)
            self._durable_generation = max(self._durable_generation, progress.generation)
