"""Syncing the journal on behalf of the shipper."""

from __future__ import annotations

import os
from contextlib import suppress

from pitfs.storage.files import fsync_directory, open_fd, storage_error
from pitfs.storage.segment import segment_path


class Durability:
    """Makes the journal durable before it is shipped, whatever the splitter has synced.

    The replica must never be ahead of what a power loss leaves here: nothing could follow its last mark then.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._named = 0  # the names of the segments up to this one are durable

    def make(self, first_segment: int, last_segment: int) -> None:
        """Syncs these segments, both inclusive, as far as they exist. Blocks. Raises PitfsError if the disk refuses."""
        try:
            for number in range(first_segment, last_segment + 1):
                path = segment_path(self._directory, number)
                # Where it was given back meanwhile, its reader will notice.
                with suppress(FileNotFoundError), open_fd(path, os.O_RDWR) as fd:
                    os.fdatasync(fd)
            if last_segment > self._named:
                fsync_directory(self._directory)
                self._named = last_segment
        except OSError as error:
            raise storage_error(error, self._directory, "making the journal durable") from error
