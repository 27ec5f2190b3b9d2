"""Contents that the replica lacks: found in the backing volumes, or in the local journal.

The checksum that the splitter took decides alone what fits, for the replica has no bytes left to compare with. So a
content is taken for another one by an accident of 64 bits only, on which every read of a store relies as well. A race
with a write is harmless: a block that is being overwritten doesn't fit.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from functools import partial
from itertools import groupby
from typing import Final

import trio
from xxhash import xxh3_64_intdigest

from pitfs.errors import CorruptionError, PitfsError
from pitfs.journal.reader import JournalReader
from pitfs.journal.search import SegmentSearch
from pitfs.journal.writer import Location
from pitfs.model.record import RecordKind
from pitfs.model.schedule import MAX_INTERVAL_ROWS
from pitfs.model.transfer import Wanted
from pitfs.replication.ports import ShipperSettings
from pitfs.splitter.messages import Backings, SplitterClient
from pitfs.storage.files import open_fd
from pitfs.storage.segment import DATA_OFFSET, list_segments, segment_path

log = logging.getLogger(__name__)

STEP_BLOCKS: Final = 4000  # looked at in one go, some 20 ms, with as long a pause behind: the shipper goes first
PAUSE_S: Final = 0.02
RETRY_S: Final = 10.0

Contents = dict[Wanted, bytes]


class ContentFinder:
    """Finds contents for the replica of one group, in its own volumes and journal only."""

    def __init__(self, settings: ShipperSettings, splitter: SplitterClient, backings: Backings) -> None:
        self._directory, self._volumes = settings.journal_directory, settings.hello.volumes
        self._block_sizes, self._splitter, self._backings = settings.block_sizes, splitter, backings

    async def find(self, wanted: Sequence[Wanted]) -> list[bytes | None]:
        """The contents, in their order; None for one that isn't here any more.

        Where this host can't look (no descriptors, another configuration) it tries again: that says nothing of them.
        """
        while True:
            found: Contents = {}
            try:
                with ExitStack() as stack:
                    fds = await self._backings.open(stack)
                    await trio.to_thread.run_sync(self._look_in_volumes, wanted, fds, found)
                splitter = await self._splitter.status()
                left = sorted((_first_seq(each, splitter.seq), each) for each in wanted if each not in found)
                for _, group in groupby(left, lambda each: each[0] // MAX_INTERVAL_ROWS):
                    step = partial(next, self._search(list(group), found, splitter.tail), None)
                    while await trio.to_thread.run_sync(step):
                        await trio.sleep(PAUSE_S)
                return [found.get(each) for each in wanted]
            except (PitfsError, OSError) as error:
                log.warning("contents that the replica wants: %s", error)
                await trio.sleep(RETRY_S)

    def _look_in_volumes(self, wanted: Sequence[Wanted], fds: Sequence[int], found: Contents) -> None:
        for each in wanted:
            if each.volume < len(fds) and each.block < self._volumes[each.volume].block_count:
                volume, start = self._volumes[each.volume], each.block * self._block_sizes[each.volume]
                with suppress(OSError):  # a bad sector: the journal may have it
                    content = os.pread(fds[each.volume], min(volume.block_size, volume.size_bytes - start), start)
                    _keep(each, content.ljust(volume.block_size, b"\0"), found)

    def _search(self, wanted: Sequence[tuple[int, Wanted]], found: Contents, until: Location) -> Iterator[bool]:
        """Looks through the writes, step by step, up to where the journal is damaged or recycled."""
        key, through, looked = (wanted[0][0], 0), max(each.through_seq for _, each in wanted), 0
        places = defaultdict[tuple[int, int], list[Wanted]](list)
        for _, each in wanted:
            places[each.volume, each.block].append(each)
        segment = SegmentSearch(self._directory, until).segment_of(key) or list_segments(self._directory)[0]
        reading = closing(JournalReader(self._directory, self._block_sizes))
        with reading as reader, suppress(CorruptionError, FileNotFoundError):
            reader.seek(Location(segment, DATA_OFFSET), (0, 0))
            for at, record in reader.records(until):
                if record.seq > through:
                    return
                if (looked := looked + 1 + record.block_count) >= STEP_BLOCKS:
                    looked = 0
                    yield True
                for number, checksum in enumerate(record.checksums if record.kind is RecordKind.WRITE else ()):
                    for each in places.get((record.volume, record.block + number), ()):
                        if each.checksum == checksum:
                            size = self._block_sizes[record.volume]
                            with open_fd(segment_path(self._directory, at.segment), os.O_RDONLY) as fd:
                                content = os.pread(fd, size, at.offset + record.contents_offset + number * size)
                            _keep(each, content, found)


def _first_seq(wanted: Wanted, last_seq: int) -> int:
    """From where the journal is looked through: no interval has more writes; of the range of a copy, the newest."""
    return max(wanted.after_seq + 1, min(wanted.through_seq, last_seq) - MAX_INTERVAL_ROWS)


def _keep(wanted: Wanted, content: bytes, found: Contents) -> None:
    if xxh3_64_intdigest(content) == wanted.checksum:
        found[wanted] = content
