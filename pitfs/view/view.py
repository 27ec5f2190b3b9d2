"""The image of a volume at an instant: resolve, read, verify (figure 8 of the patent, where the base snapshot is the
third and the end snapshot the fourth).

    offset, size -> blocks -> (pointer, checksum) of each, from tables of 512 that the store resolves
                 -> runs of neighbouring pointers -> one preadv per run into one buffer -> xxh3 of every block

The caller gives a buffer and uses it for one read after the other: a fresh MiB costs its page faults, about as much as
reading it from the page cache. A read returns a view into that buffer, valid until its next use. A PointInTimeView is
immutable and holds no descriptors; several threads may use it at once if each has its own buffer.
"""

from __future__ import annotations

import collections
import errno
import itertools
import logging
import mmap
import os
from collections.abc import Iterator
from functools import partial
from typing import Final

import numpy as np
from xxhash import xxh3_64_intdigest

from pitfs.errors import CorruptionError, PitfsError
from pitfs.model.blockmap import FANOUT, FANOUT_BITS, NODE_BYTES, I64Array, U64Array
from pitfs.storage.files import storage_error
from pitfs.store.objects.damage import Damage
from pitfs.store.objects.format import ObjectName
from pitfs.store.objects.pool import MissingObjectError, remembers_missing
from pitfs.store.store import Resolution, Store
from pitfs.view.ranges import joined, runs
from pitfs.view.readahead import Ranges, Sequence, prefetch, ranges_of

MAX_BLOCK_BYTES: Final = 64 << 10
MAX_REQUEST_BYTES: Final = 1 << 20  # the largest read that FUSE sends
# Of all processes of a mount. The tables cover 8 GiB of image in blocks of 4 KiB: enough for random reads.
MAX_TABLE_CACHE_BYTES: Final = 32 << 20

_LEAF_BITS: Final = 40  # leaves of a volume: 2**40 * 512 blocks is beyond any size
_ZEROS: Final = memoryview(bytes(MAX_REQUEST_BYTES + 2 * MAX_BLOCK_BYTES))  # as many as the largest buffer has
_NOWAIT: Final = os.RWF_NOWAIT

log = logging.getLogger(__name__)

Table = tuple[U64Array, U64Array]  # a leaf of the block map: pointers and checksums


class ReadBuffer:
    """Room for one read, with a slice for each block: hashing a MiB needs 256 slices, the same each time."""

    __slots__ = ("_blocks", "memory")

    def __init__(self, size_bytes: int = MAX_REQUEST_BYTES) -> None:
        """Room for any read of up to `size_bytes` bytes, with the rest of its first and last block."""
        # Whole pages. A bytearray of this size begins 16 bytes behind a page's start, and the kernel copies to there
        # at half the speed (measured on an EPYC: 124 instead of 58 us for a MiB).
        assert size_bytes <= MAX_REQUEST_BYTES
        room_bytes = size_bytes + 2 * MAX_BLOCK_BYTES
        self.memory = memoryview(mmap.mmap(-1, room_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self._blocks: dict[int, list[memoryview]] = {}

    def blocks(self, block_size: int) -> list[memoryview]:
        blocks = self._blocks.get(block_size)
        if blocks is None:
            count = len(self.memory) // block_size
            blocks = [self.memory[i * block_size : (i + 1) * block_size] for i in range(count)]
            self._blocks[block_size] = blocks
        return blocks


class TableCache:
    """Resolved tables of all views of a process; the oldest one is dropped first.

    Keys are plain integers (number of the view, leaf): hashing (base, end, seq, volume, leaf) on every read would
    cost as much as the lookup, and so would keeping the order of use. Threads may share it: each step is one dict
    operation.
    """

    def __init__(self, max_bytes: int = MAX_TABLE_CACHE_BYTES) -> None:
        self._max_count = max(max_bytes // NODE_BYTES, 8)
        self._tables: collections.OrderedDict[int, Table] = collections.OrderedDict()
        self._numbers = itertools.count()
        self.get = self._tables.get

    def new_view(self) -> int:
        """First key of a view; its leaf n has this + n."""
        return next(self._numbers) << _LEAF_BITS

    def put(self, key: int, table: Table) -> None:
        self._tables[key] = table
        while len(self._tables) > self._max_count:
            try:
                self._tables.popitem(last=False)
            except KeyError:  # another thread was faster
                return

    def __len__(self) -> int:
        return len(self._tables)


class PointInTimeView:
    """A volume of a store at one resolved instant."""

    def __init__(
        self, store: Store, resolution: Resolution, volume: int, tables: TableCache | None = None
    ) -> None:
        info = store.volumes[volume]
        self.resolution = resolution
        self.volume = volume
        self.size_bytes: int = info.size_bytes
        self.block_size: int = info.block_size
        self._store = store
        self._fd = store.objects.fd
        self._opened = store.objects.opened
        self._tables = TableCache() if tables is None else tables
        self._first_key = self._tables.new_view()
        self._shift = info.block_size.bit_length() - 1
        self._layout = layout = store.objects.layout
        self._unit_bits, self._unit_mask, self._unit_bytes = layout.unit_bits, layout.max_units - 1, layout.unit_bytes
        self._units = np.uint64(info.block_size // layout.unit_bytes)
        self._can_nowait = True
        self._sequence = Sequence(info.size_bytes)
        self._inline: tuple[ReadBuffer | None, tuple[memoryview]] = (None, (_ZEROS,))

    def read(self, offset: int, size: int, buffer: ReadBuffer) -> memoryview:
        """Bytes [offset, offset + size) of the image, short only at its end; waits for the disk.

        Raises:
            CorruptionError: a block isn't what was written; nothing of it is returned.
            PitfsError: the disk refuses.
        """
        try:
            data = self._read_ahead(offset, size, buffer)
        except MissingObjectError:  # of an open interval that was closed: resolved anew, its contents are there
            self._first_key = self._tables.new_view()
            with remembers_missing():
                data = self._read(offset, size, buffer, 0)
        assert data is not None
        return data

    def _read_ahead(self, offset: int, size: int, buffer: ReadBuffer) -> memoryview | None:
        """`_read` that waits for the disk. Data that aren't cached, and those behind them, are prefetched first."""
        if size > self.block_size and self._can_nowait and 0 <= offset < self.size_bytes:
            self._pointers(offset, min(offset + size, self.size_bytes))
            data = self._read(offset, size, buffer, _NOWAIT) if offset < self._sequence.prefetch_from else None
            if data is not None:
                return data
            try:
                start, end = self._sequence.next(offset, size)
                if start < end and not prefetch(self._ranges(start, end), self._fd):
                    self._sequence.stop()
            except (PitfsError, OSError) as error:  # the read of that range will report it
                log.debug("readahead: %s", error)
        return self._read(offset, size, buffer, 0)

    def _ranges(self, start: int, end: int) -> Ranges:
        """Where the blocks of bytes [start, end) stand."""
        return ranges_of(self._pointers(start, end), int(self._units), self._layout)

    def _pointers(self, start: int, end: int) -> U64Array:
        """Pointers of the blocks of bytes [start, end); resolves them where that isn't done."""
        entries = self._entries(start >> self._shift, ((end - 1) >> self._shift) + 1, 0)
        assert entries is not None
        return entries[0]

    def try_read_cached(self, offset: int, size: int, buffer: ReadBuffer) -> memoryview | None:
        """The same if it needs no waiting: tables resolved, objects open, data in the page cache. Else None:
        call `read`.

        The read of one block is written out, since random reads consist of them.
        """
        shift = self._shift
        block = offset >> shift
        if (offset + size - 1) >> shift != block or offset + size > self.size_bytes or offset < 0:
            is_inline = self._can_nowait and offset < self._sequence.prefetch_from
            return self._read(offset, size, buffer, _NOWAIT) if is_inline else None
        table = self._tables.get(self._first_key + (block >> FANOUT_BITS))
        if table is None:
            return None
        index = block & (FANOUT - 1)
        pointer = table[0].item(index)
        if not pointer:
            return _ZEROS[:size]
        if not self._can_nowait:
            return None
        inline = self._inline
        if inline[0] is not buffer:
            inline = self._inline = (buffer, (buffer.blocks(self.block_size)[0],))
        fd = self._opened(pointer >> self._unit_bits)
        if fd is None:  # opening it may wait for the disk
            return None
        try:
            position = fd.start + (pointer & self._unit_mask) * self._unit_bytes
            count = os.preadv(fd, inline[1], position, _NOWAIT)
        except OSError as error:
            self._not_now(error, pointer)
            return None
        if count != self.block_size:
            return None
        target = inline[1][0]
        if xxh3_64_intdigest(target) != table[1].item(index):
            raise self._corruption(block, pointer, table[1].item(index))
        if size == self.block_size:
            return target
        start = offset & (self.block_size - 1)
        return target[start : start + size]

    def data_ranges(self, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
        """Byte ranges [a, b) within [start, end) of the image that aren't known to be zeros, ascending, coalesced.

        Block by block, as the pointers say: a block of zeros that was written, and is known to be zeros, has no
        pointer either. Empty leaves are skipped: the cost is that of the leaves that have data in [start, end).

        Raises:
            CorruptionError: block map or journal is damaged.
            PitfsError: the disk refuses.
        """
        low, high = max(start, 0), self.size_bytes if end is None else min(end, self.size_bytes)
        leaf_bytes = FANOUT * self.block_size

        def ranges_of_leaves() -> Iterator[I64Array]:
            following, end = partial(self._store.next_leaf, self.resolution, self.volume), -(-high // leaf_bytes)
            index = following(low // leaf_bytes, end) if low < high else None
            while index is not None:
                pointers, _ = self._table(index)
                yield (runs(pointers != 0) * self.block_size + index * leaf_bytes).clip(low, high)
                index = following(index + 1, end)

        return joined(ranges_of_leaves())

    # -------------------------------------------------------------- inside

    def _table(self, leaf: int) -> Table:
        key = self._first_key + leaf
        table = self._tables.get(key)
        if table is None:
            table = self._store.leaf(self.resolution, self.volume, leaf)
            self._tables.put(key, table)
        return table

    def _entries(self, first: int, last: int, flags: int) -> Table | None:
        """Pointers and checksums of the blocks [first, last); None if flags forbid to resolve any now."""
        parts: list[Table] = []
        for leaf in range(first >> FANOUT_BITS, ((last - 1) >> FANOUT_BITS) + 1):
            table = self._tables.get(self._first_key + leaf) if flags else self._table(leaf)
            if table is None:
                return None
            low, high = max(first - leaf * FANOUT, 0), min(last - leaf * FANOUT, FANOUT)
            parts.append((table[0][low:high], table[1][low:high]))
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def _read(self, offset: int, size: int, buffer: ReadBuffer, flags: int) -> memoryview | None:
        end = min(offset + size, self.size_bytes)
        if offset < 0 or offset >= end:
            return _ZEROS[:0]
        shift = self._shift
        first, last = offset >> shift, ((end - 1) >> shift) + 1
        if (last - first) << shift > len(buffer.memory):
            raise ValueError(f"a read of {size} bytes is larger than its buffer")
        entries = self._entries(first, last, flags)
        if entries is None:
            return None
        pointers, checksums = entries
        data_count = int(np.count_nonzero(pointers))
        if not data_count:
            return _ZEROS[: end - offset]
        breaks = (pointers[1:] - pointers[:-1]) != self._units  # the difference wraps, which equality allows
        if data_count < last - first:
            breaks &= (pointers[1:] != 0) | (pointers[:-1] != 0)
        starts = breaks.nonzero()[0] + 1
        heads, starts = [pointers.item(0), *pointers[starts].tolist()], [0, *starts.tolist(), last - first]
        memory = buffer.memory
        for pointer, (low, high) in zip(heads, itertools.pairwise(starts), strict=True):
            if not pointer:
                memory[low << shift : high << shift] = _ZEROS[: (high - low) << shift]
            elif not self._read_run(pointer, memory[low << shift : high << shift], flags):
                return None
        self._verify(first, pointers, checksums, data_count, buffer)
        start = offset - (first << shift)
        return memory[start : start + end - offset]

    def _read_run(self, pointer: int, target: memoryview, flags: int) -> bool:
        """Fills `target` with the consecutive blocks from `pointer` on; False if it would wait and flags forbid it."""
        number = pointer >> self._unit_bits
        fd = self._opened(number) if flags else self._fd(number)
        if fd is None:
            return False
        position = fd.start + (pointer & self._unit_mask) * self._unit_bytes
        while True:
            try:
                count = os.preadv(fd, (target,), position, flags)
            except OSError as error:
                if not flags:
                    raise self._refused(error, pointer, position) from error
                self._not_now(error, pointer)
                return False
            if count == len(target) or flags:
                return count == len(target)
            if count == 0:
                raise CorruptionError(self._place(pointer)[0], position, "the object ends here")
            target = target[count:]
            position += count

    def _verify(
        self, first: int, pointers: U64Array, checksums: U64Array, data_count: int, buffer: ReadBuffer
    ) -> None:
        """Compares the blocks in the buffer, from its start on, with their checksums; zeros weren't read."""
        blocks = buffer.blocks(self.block_size)[: len(pointers)]
        expected: list[int]
        if data_count == len(pointers):
            expected = checksums.tolist()
        else:
            is_data = pointers != 0
            blocks = list(itertools.compress(blocks, is_data.tolist()))
            expected = checksums[is_data].tolist()
        found = list(map(xxh3_64_intdigest, blocks))
        if found != expected:
            bad = next(i for i, digest in enumerate(found) if digest != expected[i])
            index = int(np.flatnonzero(pointers)[bad])
            raise self._corruption(first + index, pointers.item(index), expected[bad])

    def _not_now(self, error: OSError, pointer: int) -> None:
        """Returns if the error of a read that must not wait means that it would have waited; else raises it."""
        if error.errno == errno.EOPNOTSUPP:  # this filesystem can't tell: always read in a thread
            self._can_nowait = False
        elif error.errno != errno.EAGAIN:
            raise self._refused(error, pointer) from error

    def _refused(self, error: OSError, pointer: int, position: int | None = None) -> PitfsError:
        file, start = self._place(pointer)
        return storage_error(error, file, f"reading at byte {start if position is None else position}")

    def _place(self, pointer: int) -> tuple[str, int]:
        name = ObjectName.of_number(self._layout.object_of(pointer))
        return self._store.objects.place(name, self._layout.offset_of(pointer))

    def _corruption(self, block: int, pointer: int, checksum: int) -> CorruptionError:
        """The error for the reader of a block; the store remembers where it is."""
        offset, name = self._layout.offset_of(pointer), ObjectName.of_number(self._layout.object_of(pointer))
        of_block = self.volume, block, checksum, 0, self.resolution.seq
        self._store.objects.damage.note(Damage(name.file, offset, self.block_size, "content", *of_block))
        problem = f"block {block} of volume {self._store.volumes[self.volume].name} doesn't match its checksum"
        return CorruptionError(*self._place(pointer), problem)
