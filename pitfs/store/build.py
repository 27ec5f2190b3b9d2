"""From a complete staged transfer to objects: the block map and the index of the difference journal.

Both are made by streaming over the sorted rows; python's loops are over leaves of the map and chunks of the
journal, never over blocks or writes.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np
from xxhash import xxh3_64_intdigest

from pitfs.errors import CapacityError
from pitfs.model.blockmap import NODE_BYTES, Entry, LoadNode, MapBuilder, Node, U64Array
from pitfs.model.transfer import Manifest, Section, Source, VolumeInfo
from pitfs.storage.files import write_all
from pitfs.store.facts import ObjectFacts
from pitfs.store.journals import JournalWriter
from pitfs.store.layout import (
    HEADER_BYTES,
    MAX_UNITS,
    UNIT_BITS,
    ObjectHeader,
    ObjectKind,
    contents_object,
    object_file,
    pointer,
)
from pitfs.store.rows import RowArray
from pitfs.store.staging import StagedTransfer

FLUSH_BYTES: Final = 1 << 20


class MapFacts(msgspec.Struct, frozen=True):
    """What stands behind the nodes of a map, as JSON: all that the catalog knows of this snapshot."""

    manifest: Manifest
    roots: tuple[tuple[int, int], ...]  # pointer, checksum of each volume


@dataclass(frozen=True, slots=True)
class Built:
    """What was made, in staging and synced, to be published."""

    roots: tuple[Entry, ...]
    objects: tuple[ObjectFacts, ...]
    minutes: dict[int, int]


class _MapFile:
    """Nodes of a new map, appended through a bounded buffer."""

    def __init__(self, fd: int, snapshot: int) -> None:
        self._fd, self._snapshot = fd, snapshot
        self.count = 0
        self._buffer = bytearray()

    def emit(self, node: Node) -> int:
        if self.count >= MAX_UNITS:
            raise CapacityError(f"snapshot {self._snapshot}: its map has more nodes than a pointer can count")
        self._buffer += node.data.cast("B")
        self.count += 1
        if len(self._buffer) >= FLUSH_BYTES:
            self.flush()
        return pointer(self._snapshot, self.count - 1)

    def flush(self) -> None:
        offset = HEADER_BYTES + self.count * NODE_BYTES - len(self._buffer)
        write_all(self._fd, self._buffer, offset)
        self._buffer.clear()


def build(
    staged: StagedTransfer,
    history: bytes,
    volumes: Sequence[VolumeInfo],
    roots_before: Sequence[Entry],
    load_node: LoadNode,
) -> Built:
    """Makes map and journal index in staging, completes the headers of all objects and syncs them.

    Args:
        staged: complete and checked.
        roots_before: of the snapshot before, EMPTY for a full copy.
        load_node: reads nodes of committed maps.

    Raises:
        CorruptionError: the map before, or what is staged, is damaged.
        CapacityError, OSError: the disk is full, or refuses.
    """
    snapshot = staged.snapshot
    facts = []
    path = os.path.join(staged.directory, object_file(ObjectKind.MAP, snapshot))
    fd = _create(path)
    try:
        map_file = _MapFile(fd, snapshot)
        roots = _build_maps(staged, volumes, roots_before, load_node, map_file)
        map_file.flush()
        tail = msgspec.json.encode(
            MapFacts(staged.manifest, tuple((root.pointer, root.checksum) for root in roots))
        )
        data_bytes = map_file.count * NODE_BYTES
        write_all(fd, tail, HEADER_BYTES + data_bytes)
        header = ObjectHeader(
            ObjectKind.MAP, history, snapshot, data_bytes, len(tail), xxh3_64_intdigest(tail)
        )
        facts.append(_complete(fd, header))
    finally:
        os.close(fd)
    minutes = {staged.manifest.to_time_ns // 60_000_000_000: _second_bit(staged.manifest.to_time_ns)}
    if staged.has_journal:
        index_facts = _build_journal(staged, history, minutes)
        facts.append(index_facts)
    for section, kind in (
        (Section.DIFF_BLOCKS, ObjectKind.SNAPSHOT_BLOCKS),
        (Section.JOURNAL_BLOCKS, ObjectKind.JOURNAL_BLOCKS),
    ):
        length = staged.lengths[section - 1]
        if length:
            facts.append(_complete(staged.fd(section), ObjectHeader(kind, history, snapshot, length)))
    return Built(tuple(roots), tuple(facts), minutes)


def _create(path: str) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)


def _complete(fd: int, header: ObjectHeader) -> ObjectFacts:
    """Writes the final header and makes the file durable."""
    write_all(fd, header.encode(), 0)
    os.fsync(fd)
    return ObjectFacts(
        object_file(header.kind, header.snapshot), header.kind, header.snapshot,
        header.data_bytes, header.tail_bytes, header.tail_checksum,
    )  # fmt: skip


def _by_volume(batches: Iterator[RowArray]) -> Iterator[tuple[int, RowArray]]:
    """The rows cut where the volume changes."""
    for rows in batches:
        volume = rows["volume"]
        cuts = [0, *(np.flatnonzero(volume[1:] != volume[:-1]) + 1).tolist(), len(rows)]
        for start, end in itertools.pairwise(cuts):
            yield int(volume[start]), rows[start:end]


def _pointers(rows: RowArray, snapshot: int) -> tuple[U64Array, U64Array]:
    """Pointers and checksums of rows of either kind; both 0 where the block is zeros."""
    objects = np.zeros(len(Source), "<u8")
    objects[Source.FOURTH] = contents_object(snapshot, ObjectKind.SNAPSHOT_BLOCKS) << UNIT_BITS
    objects[Source.JOURNAL] = contents_object(snapshot, ObjectKind.JOURNAL_BLOCKS) << UNIT_BITS
    checksums = np.where(rows["source"] == Source.ZERO, np.uint64(0), rows["checksum"])
    return objects[rows["source"]] | rows["unit"], checksums


def _build_maps(
    staged: StagedTransfer,
    volumes: Sequence[VolumeInfo],
    roots_before: Sequence[Entry],
    load_node: LoadNode,
    map_file: _MapFile,
) -> list[Entry]:
    roots = list(roots_before)
    current, builder = -1, None
    for volume, rows in _by_volume(staged.rows(Section.DIFF)):
        if volume != current:
            if builder is not None:
                roots[current] = builder.finish()
            current = volume
            builder = MapBuilder(volumes[volume].block_count, roots[volume], load_node, map_file.emit)
        assert builder is not None
        builder.update(rows["block"].astype("<i8"), *_pointers(rows, staged.snapshot))
    if builder is not None:
        roots[current] = builder.finish()
    return roots


def _build_journal(staged: StagedTransfer, history: bytes, minutes: dict[int, int]) -> ObjectFacts:
    """Writes the index; also notes which seconds of which minutes have a position."""
    fd = _create(os.path.join(staged.directory, object_file(ObjectKind.JOURNAL_INDEX, staged.snapshot)))
    try:
        writer = JournalWriter(fd)
        for volume, rows in _by_volume(staged.rows(Section.JOURNAL)):
            pointers, checksums = _pointers(rows, staged.snapshot)
            writer.add_rows(
                volume, rows["block"].astype("<i8"), rows["seq"].astype("<i8"), pointers, checksums
            )
        for positions in staged.rows(Section.POSITIONS):
            writer.add_positions(positions["seq"].astype("<i8"), positions["time_ns"])
            for second in np.unique(positions["time_ns"] // 1_000_000_000).tolist():
                minutes[second // 60] = minutes.get(second // 60, 0) | 1 << (second % 60)
        data_bytes, tail_bytes, tail_checksum = writer.finish()
        header = ObjectHeader(
            ObjectKind.JOURNAL_INDEX, history, staged.snapshot, data_bytes, tail_bytes, tail_checksum
        )
        return _complete(fd, header)
    finally:
        os.close(fd)


def _second_bit(time_ns: int) -> int:
    return 1 << (time_ns // 1_000_000_000 % 60)
