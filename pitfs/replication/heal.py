"""Contents that the replica lacks: found in the backing volumes, or in the local journal.

The checksum that the splitter took of a content decides alone what fits: no bytes are left to compare with, since the
replica has lost them. So a content can only be taken for another one by an accident of 64 bits, the same on which every
read of a store relies. It also makes a race with a write harmless: a block that is being overwritten doesn't fit.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence
from typing import Final

import trio
from xxhash import xxh3_64_intdigest

from pitfs.errors import CorruptionError, PitfsError
from pitfs.journal.reader import JournalReader
from pitfs.journal.search import SegmentSearch
from pitfs.journal.writer import Location
from pitfs.model.record import CHECKSUM, Record, RecordKind
from pitfs.model.schedule import MAX_INTERVAL_ROWS
from pitfs.model.transfer import Wanted
from pitfs.replication.ports import ShipperSettings
from pitfs.splitter.messages import Backings, SplitterClient
from pitfs.storage.files import open_fd
from pitfs.storage.segment import DATA_OFFSET, segment_path

log = logging.getLogger(__name__)

STEP_RECORDS: Final = 2000  # read in one go, some 20 ms: the shipper shares the interpreter
RETRY_S: Final = 10.0

_Places = Mapping[tuple[int, int], Sequence[int]]  # volume and block -> indexes of what is wanted of it


class ContentFinder:
    """Finds contents for the replica of one group, in its own volumes and journal only."""

    def __init__(self, settings: ShipperSettings, splitter: SplitterClient, backings: Backings) -> None:
        self._directory, self._volumes = settings.journal_directory, settings.hello.volumes
        self._block_sizes = settings.block_sizes
        self._splitter, self._backings = splitter, backings

    async def find(self, wanted: Sequence[Wanted]) -> list[bytes | None]:
        """The contents, in their order; None for one that isn't here any more.

        A journal is read in steps, with as much time between them as they take. While this host refuses to read (no
        descriptors, another configuration) it is tried again and again: that says nothing of the contents.
        """
        while True:
            found: dict[int, bytes] = {}
            try:
                with contextlib.ExitStack() as stack:
                    fds = await self._backings.open(stack)
                    await trio.to_thread.run_sync(self._look_in_volumes, wanted, fds, found)
                await self._look_in_journal(wanted, found)
                return [found.get(index) for index in range(len(wanted))]
            except (PitfsError, OSError) as error:
                log.warning("contents that the replica wants: %s", error)
                await trio.sleep(RETRY_S)

    def _look_in_volumes(self, wanted: Sequence[Wanted], fds: Sequence[int], found: dict[int, bytes]) -> None:
        for index, each in enumerate(wanted):
            if each.volume >= len(fds) or each.block >= self._volumes[each.volume].block_count:
                continue
            volume = self._volumes[each.volume]
            start = each.block * volume.block_size
            with contextlib.suppress(OSError):  # a bad sector: the journal may have it
                content = os.pread(fds[each.volume], min(volume.block_size, volume.size_bytes - start), start)
                _keep_if_fits(content.ljust(volume.block_size, b"\0"), index, each, found)

    async def _look_in_journal(self, wanted: Sequence[Wanted], found: dict[int, bytes]) -> None:
        """Looks for what isn't found, once for each range of writes."""
        ranges = defaultdict[tuple[int, int], list[int]](list)
        for index, each in enumerate(wanted):
            if index not in found and each.volume < len(self._volumes):
                ranges[each.after_seq, each.through_seq].append(index)
        for (after, through), indexes in ranges.items():
            # No interval has more writes; where more may have brought it, a copy did: then the newest are looked at.
            search = self._search(
                wanted, indexes, max(after, through - MAX_INTERVAL_ROWS), through, found,
                (await self._splitter.status()).tail,
            )  # fmt: skip
            with contextlib.closing(search):
                while True:
                    begun = trio.current_time()
                    if await trio.to_thread.run_sync(next, search, None) is None:
                        break
                    await trio.sleep(trio.current_time() - begun)

    def _search(
        self, wanted: Sequence[Wanted], indexes: Sequence[int], after: int, through: int, found: dict[int, bytes],
        until: Location,
    ) -> Generator[bool]:  # fmt: skip
        """Looks through the writes in (after, through], a step each time; up to where the journal is whole."""
        places = defaultdict[tuple[int, int], list[int]](list)
        for index in indexes:
            places[wanted[index].volume, wanted[index].block].append(index)
        search = SegmentSearch(self._directory, until)
        first = search.segment_of((after + 1, 0)) or search.first
        if first is None:
            return
        with contextlib.closing(JournalReader(self._directory, self._block_sizes)) as reader:
            reader.seek(Location(first, DATA_OFFSET), (0, 0))
            with contextlib.suppress(CorruptionError):  # damaged there, or recycled meanwhile
                for count, (location, record) in enumerate(reader.records(until), 1):
                    if record.seq > through:
                        return
                    if record.kind is RecordKind.WRITE and record.seq > after:
                        self._look_at(location, record, wanted, places, found)
                    if count % STEP_RECORDS == 0:
                        if all(index in found for index in indexes):
                            return
                        yield True

    def _look_at(
        self, location: Location, record: Record, wanted: Sequence[Wanted], places: _Places, found: dict[int, bytes]
    ) -> None:
        size = self._block_sizes[record.volume]
        for number in range(record.block_count):
            for index in places.get((record.volume, record.block + number), ()):
                if (wanted[index].checksum,) == CHECKSUM.unpack_from(record.covered, number * CHECKSUM.size):
                    path = segment_path(self._directory, location.segment)
                    with contextlib.suppress(FileNotFoundError), open_fd(path, os.O_RDONLY) as fd:
                        offset = location.offset + record.contents_offset + number * size
                        _keep_if_fits(os.pread(fd, size, offset), index, wanted[index], found)


def _keep_if_fits(content: bytes, index: int, wanted: Wanted, found: dict[int, bytes]) -> None:
    if xxh3_64_intdigest(content) == wanted.checksum:
        found[index] = content
