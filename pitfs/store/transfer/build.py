"""From a complete staged snapshot diff to objects: contents and block map.

The map is made by streaming over the sorted rows; python's loops are over its leaves, never over blocks.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from pitfs.errors import CapacityError
from pitfs.model.blockmap import NODE_BYTES, I64Array, LoadNode, MapBuilder, MapEntry, Node, U64Array
from pitfs.model.transfer import UNIT_BYTES, Manifest, Section, Source, VolumeInfo
from pitfs.storage.files import write_all
from pitfs.store.objects.format import (
    HEADER_BYTES,
    MAX_UNITS,
    ObjectHeader,
    ObjectKind,
    ObjectRecord,
    contents_object,
    object_file,
    pointer,
)
from pitfs.store.objects.publishing import complete, create
from pitfs.store.transfer.staging import StagedTransfer
from pitfs.store.transfer.validation import RowArray

FLUSH_BYTES: Final = 1 << 20


class MapFooter(msgspec.Struct, frozen=True):
    """What stands behind the nodes of a map, as JSON: all that the catalog knows of this snapshot."""

    manifest: Manifest
    roots: tuple[tuple[int, int], ...]  # pointer, checksum of each volume


@dataclass(frozen=True, slots=True)
class Built:
    """What was made, in staging and synced, to be published."""

    roots: tuple[MapEntry, ...]
    objects: tuple[ObjectRecord, ...]
    minutes: dict[int, int]


class MapWriter:
    """Makes the block maps of a snapshot from sorted updates of those before.

    Args:
        fd: of the new object, written through a bounded buffer.
        roots_before: of the snapshot before, EMPTY for a full copy.
        load_node: reads nodes of committed maps.
    """

    def __init__(
        self,
        fd: int,
        snapshot: int,
        volumes: Sequence[VolumeInfo],
        roots_before: Sequence[MapEntry],
        load_node: LoadNode,
    ) -> None:
        self._fd, self._snapshot, self._volumes, self._load_node = fd, snapshot, volumes, load_node
        self._count = 0
        self._buffer = bytearray()
        self._roots = list(roots_before)
        self._volume = -1
        self._builder: MapBuilder | None = None

    def update(self, volume: int, blocks: I64Array, pointers: U64Array, checksums: U64Array) -> None:
        """Sets entries of a volume's blocks; (volume, block) strictly ascend over all calls."""
        if volume != self._volume:
            self._end_volume()
            self._volume = volume
            self._builder = MapBuilder(
                self._volumes[volume].block_count, self._roots[volume], self._load_node, self._emit
            )
        assert self._builder is not None
        self._builder.update(blocks, pointers, checksums)

    def finish(self, manifest: Manifest, history: bytes) -> tuple[tuple[MapEntry, ...], ObjectRecord]:
        """Writes what is left and makes the object durable; returns the roots, and the object."""
        self._end_volume()
        self._flush()
        roots = tuple(self._roots)
        tail = msgspec.json.encode(MapFooter(manifest, tuple((root.pointer, root.checksum) for root in roots)))
        data_bytes = self._count * NODE_BYTES
        write_all(self._fd, tail, HEADER_BYTES + data_bytes)
        header = ObjectHeader(
            ObjectKind.MAP, history, self._snapshot, data_bytes, len(tail), xxh3_64_intdigest(tail)
        )
        return roots, complete(self._fd, header)

    def _end_volume(self) -> None:
        if self._builder is not None:
            self._roots[self._volume] = self._builder.finish()
            self._builder = None

    def _emit(self, node: Node) -> int:
        if self._count >= MAX_UNITS:
            raise CapacityError(f"snapshot {self._snapshot}: its map has more nodes than a pointer can count")
        self._buffer += node.data.cast("B")
        self._count += 1
        if len(self._buffer) >= FLUSH_BYTES:
            self._flush()
        return pointer(self._snapshot, self._count - 1)

    def _flush(self) -> None:
        offset = HEADER_BYTES + self._count * NODE_BYTES - len(self._buffer)
        write_all(self._fd, self._buffer, offset)
        self._buffer.clear()


def build(
    staged: StagedTransfer,
    history: bytes,
    volumes: Sequence[VolumeInfo],
    roots_before: Sequence[MapEntry],
    load_node: LoadNode,
) -> Built:
    """Makes map and journal index in staging, completes the headers of all objects and syncs them.

    Args:
        staged: complete and checked.
        roots_before: of the snapshot before, EMPTY for a full copy.
        load_node: reads nodes of committed maps.

    Raises:
        RemoteProtocolError: a row shares another content than the splitter took in.
        CorruptionError: the map before, or what is staged, is damaged.
        CapacityError, OSError: the disk is full, or refuses.
    """
    snapshot = staged.snapshot
    facts = []
    path = os.path.join(staged.directory, object_file(ObjectKind.MAP, snapshot))
    fd = create(path)
    try:
        writer = MapWriter(fd, snapshot, volumes, roots_before, load_node)
        _update_map(staged, volumes, writer)
        roots, map_facts = writer.finish(staged.manifest, history)
        facts.append(map_facts)
    finally:
        os.close(fd)
    minutes = {staged.manifest.to_time_ns // 60_000_000_000: second_bit(staged.manifest.to_time_ns)}
    length = staged.lengths[Section.DIFF_BLOCKS - 1]
    if length:
        header = ObjectHeader(ObjectKind.SNAPSHOT_BLOCKS, history, snapshot, length)
        facts.append(complete(staged.fd(Section.DIFF_BLOCKS), header))
    return Built(roots, tuple(facts), minutes)


def by_volume(batches: Iterable[RowArray]) -> Iterator[tuple[int, RowArray]]:
    """The rows cut where the volume changes."""
    for rows in batches:
        volume = rows["volume"]
        cuts = [0, *(np.flatnonzero(volume[1:] != volume[:-1]) + 1).tolist(), len(rows)]
        for start, end in itertools.pairwise(cuts):
            yield int(volume[start]), rows[start:end]


class OwnContents:
    """Pointers and checksums of rows that have contents of their own: these stand in the order of the rows.

    Args:
        section: of the contents.
        first: pointer of the block that comes next; block: its number in the section.
    """

    def __init__(
        self, staged: StagedTransfer, section: Section, volumes: Sequence[VolumeInfo], first: int, block: int = 0
    ) -> None:
        self._staged, self._section = staged, section
        self._units = np.array([volume.block_size // UNIT_BYTES for volume in volumes], "<u8")
        self._next, self._block = first, block

    def of(self, volumes: npt.NDArray[np.uint16]) -> tuple[U64Array, U64Array]:
        """Of the next rows, which lie in these volumes."""
        sizes = self._units[volumes]
        ends = np.cumsum(sizes, dtype="<u8")
        pointers = np.uint64(self._next) + ends - sizes
        checksums = self._staged.checksums(self._section, self._block, len(sizes))
        self._next += int(ends[-1]) if len(ends) else 0
        self._block += len(sizes)
        return pointers, checksums


def _update_map(staged: StagedTransfer, volumes: Sequence[VolumeInfo], writer: MapWriter) -> None:
    first = pointer(contents_object(staged.snapshot, ObjectKind.SNAPSHOT_BLOCKS), 0)
    own = OwnContents(staged, Section.DIFF_BLOCKS, volumes, first)
    for volume, rows in by_volume(staged.rows(Section.DIFF)):
        pointers, checksums = np.zeros((2, len(rows)), "<u8")
        stored = rows["source"] == Source.FOURTH
        pointers[stored], checksums[stored] = own.of(rows["volume"][stored])
        shared = rows["source"] == Source.SHARED_FOURTH
        if shared.any():
            pointers[shared] = rows["unit"][shared] + np.uint64(first)
            fd = staged.fd(Section.DIFF_BLOCKS)
            checksums[shared] = read_checksums(fd, rows["unit"][shared], volumes[volume].block_size)
            staged.take_shared(Section.DIFF_BLOCKS, checksums[shared])
        writer.update(volume, rows["block"].astype("<i8"), pointers, checksums)
    staged.check_shared(Section.DIFF_BLOCKS)


def read_checksums(fd: int, units: U64Array, block_size: int) -> U64Array:
    """xxh3_64 of the blocks that stand there in an object of contents; of less than a block at its end."""
    reads = (os.pread(fd, block_size, HEADER_BYTES + unit * UNIT_BYTES) for unit in units.tolist())
    return np.fromiter(map(xxh3_64_intdigest, reads), "<u8", len(units))


def second_bit(time_ns: int) -> int:
    """Bit of a second within its minute."""
    return 1 << (time_ns // 1_000_000_000 % 60)
