"""The history of a store, walked from snapshot to snapshot: what each has that the one before it has not.

So each node comes once in the whole history, in the map that brought it, and so does each content. A node that is
damaged counts as one without entries: the walk goes on beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np

from pitfs.errors import CorruptionError
from pitfs.model.blockmap import (
    EMPTY,
    FANOUT_BITS,
    POINTERS,
    BlockMap,
    I64Array,
    MapEntry,
    Node,
    U64Array,
    new_node,
    tree_depth,
)
from pitfs.model.transfer import VolumeInfo
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.catalog.records import Interval, OpenInterval, Snapshot
from pitfs.store.index.maps import node_loader
from pitfs.store.index.merge import BY_BLOCK, Rows, merged
from pitfs.store.index.reader import RowIndex, chunk_cache
from pitfs.store.objects.damage import MAX_PLACES, Damage, DamageLog
from pitfs.store.objects.format import CATALOG, HEADER_BYTES, MAX_SEQ, ObjectKind, ObjectName
from pitfs.store.objects.pool import MissingObjectError, ObjectPool

T = TypeVar("T")

IN_CATALOG: Final = Damage(CATALOG, 0, 0, "catalog")
_NO_ENTRIES: Final = new_node()


class Found(DamageLog):
    """What a check finds, by place; the log itself is changed when it is done.

    Attributes:
        ends: byte of an object from which on nothing of it can be read, 0 where it is missing or can't be opened.
    """

    def __init__(self, store: str, places: Sequence[Damage] = ()) -> None:
        super().__init__(store)
        self.places, self.ends = dict[tuple[str, int], Damage](), dict[str, int]()
        for each in places:
            self.note(each)

    def note(self, damage: Damage) -> None:
        if len(self.places) < MAX_PLACES:
            self.places.setdefault(damage.place, damage)
            if damage.kind in ("missing", "header"):
                self.ends[damage.object] = damage.offset

    def remember(self, damage: Damage) -> None:
        """Puts it into the log at once: a check may take days."""
        super().note(damage)


@dataclass(frozen=True, slots=True)
class Part:
    """An index of a journal. `offset`, `size`: of the sparse index in `name`; `index`: None where that is damaged.

    States from write `from_seq`, at `from_ns`, on need it.
    """

    name: ObjectName
    offset: int
    size: int
    from_seq: int
    from_ns: int
    index: RowIndex | None


@dataclass(frozen=True, slots=True)
class Journal:
    """The writes between a snapshot and the next one, or behind the last; to_seq, to_ns: the last of them, that is in.

    Of the last write before the next snapshot the state is that snapshot: it isn't in.
    """

    to_seq: int
    to_ns: int
    parts: tuple[Part, ...]

    def rows(self) -> Iterator[Rows]:
        """INDEX_ROWs ascending by (volume, block, seq), without those that are damaged."""
        runs = [part.index.all_rows(passes_over=True) for part in self.parts if part.index is not None]
        return merged(runs, BY_BLOCK, CorruptionError(CATALOG, 0, "two runs have the same row"))

    def positions(self) -> Iterator[Rows]:
        """POSITIONs, ascending, without those that are damaged."""
        for part in self.parts:
            if part.index is not None:
                for rows in part.index.all_positions(passes_over=True):
                    yield rows[rows["seq"] <= self.to_seq]


class Walk:
    """Reads a store's history; what is damaged goes to `found`, and is passed over.

    Args:
        objects: whose `damage` is `found`.
    """

    def __init__(self, catalog: Catalog, objects: ObjectPool, volumes: Sequence[VolumeInfo], found: Found) -> None:
        self.catalog, self.objects, self.volumes, self.found = catalog, objects, volumes, found
        self._load = node_loader(objects)

    def after(self, snapshot: Snapshot | None) -> Snapshot | None:
        """The next snapshot that the catalog can give. Raises CorruptionError: the catalog itself can't be read."""
        after_id = snapshot.id if snapshot else 0
        while rows := self.catalog.rows("SELECT * FROM snapshots WHERE id > ? ORDER BY id LIMIT 1", (after_id,)):
            try:
                return Snapshot(*self.catalog.verified("snapshots", rows[0]))
            except CorruptionError:
                self.found.note(IN_CATALOG)
                after_id = rows[0][0]
        return None

    def interval(self, before: Snapshot, snapshot: Snapshot) -> Interval:
        """The interval between two neighbours. Raises CorruptionError: the catalog has another, or none."""
        found = self.catalog.interval_to(snapshot.id)
        bounds = before.seq, before.time_ns, snapshot.seq, snapshot.time_ns
        if found is None or (found.base_snapshot_id, *found.bounds) != (before.id, *bounds):
            raise CorruptionError(self.catalog.path, 0, f"the interval of snapshot {snapshot.id} doesn't fit to it")
        return found

    def roots(self, snapshot: Snapshot | None) -> list[MapEntry]:
        """Of its block maps; EMPTY without a snapshot. Raises CorruptionError."""
        roots = self.catalog.roots(snapshot.id) if snapshot else [EMPTY] * len(self.volumes)
        if len(roots) != len(self.volumes):
            raise CorruptionError(self.catalog.path, 0, "roots of a snapshot are missing")
        return roots

    def node(self, pointer: int, checksum: int) -> Node:
        """The node; one without entries where it is damaged, or where there is none (0)."""
        node = self.tried(lambda: self._load(pointer, checksum)) if pointer else None
        return _NO_ENTRIES if node is None else node

    def maps(self, roots: Sequence[MapEntry]) -> list[BlockMap]:
        return [BlockMap(root, each.block_count, self.node) for root, each in zip(roots, self.volumes, strict=True)]

    def new_leaves(
        self, volume: int, root: MapEntry, before: Snapshot | None, first: int
    ) -> Iterator[tuple[int, I64Array, U64Array]]:
        """Leaves of a snapshot's map, from leaf `first` on, that the snapshot before doesn't have.

        What is new has ids after that one's: contents and nodes are stored in the interval that brings them.

        Yields:
            index; slots of the blocks whose contents are new; pointers and checksums of these, uint64[2, n].
        """
        unit_bits, after_id = self.objects.layout.unit_bits, before.id if before else 0

        def walk(entry: MapEntry, level: int, index: int) -> Iterator[tuple[int, I64Array, U64Array]]:
            if entry.pointer >> unit_bits <= after_id or (index + 1) << FANOUT_BITS * level <= first:
                return
            node = self.node(entry.pointer, entry.checksum)
            ids = node[POINTERS] >> np.uint64(unit_bits if level else unit_bits + 1)
            slots = (ids > after_id).nonzero()[0]
            if not level:
                yield index, slots, node[:, slots]
                return
            for slot, pointer, checksum in zip(slots.tolist(), *node[:, slots].tolist(), strict=True):
                yield from walk(MapEntry(pointer, checksum), level - 1, index << FANOUT_BITS | slot)

        return walk(root, tree_depth(self.volumes[volume].block_count) - 1, 0)

    def journal(self, interval: Interval) -> Journal | None:
        """The interval's difference journal, None where it has none. Raises CorruptionError: the catalog is damaged."""
        if interval.granularity_ns is None:
            return None
        name = ObjectName(ObjectKind.JOURNAL_INDEX, interval.end_snapshot_id, interval.layer)
        record = self.catalog.object(name.file)
        if record is None:
            raise CorruptionError(self.catalog.path, 0, f"it lists an interval but not {name.file}")
        first_ns = interval.first_time_ns or interval.from_time_ns + 1
        start = HEADER_BYTES + record.data_bytes, record.footer_bytes
        part = self._part(name, *start, record.footer_checksum, interval.from_seq + 1, first_ns)
        return Journal(interval.to_seq - 1, interval.to_time_ns - 1, (part,))

    def open_journal(self, intervals: Sequence[OpenInterval]) -> Journal | None:
        """Of the open intervals behind the last snapshot, as far as they are readable; None where nothing is."""
        runs = [run for each in intervals for run in each.runs]
        parts = tuple(
            self._part(
                ObjectName(ObjectKind.JOURNAL_BLOCKS, run.open_interval_id), run.sparse_index_offset,
                run.sparse_index_bytes, run.sparse_index_checksum, run.first_seq, run.first_time_ns,
            ) for run in runs
        )  # fmt: skip
        return Journal(MAX_SEQ, intervals[-1].to_time_ns, parts) if parts else None

    def _part(self, name: ObjectName, offset: int, size: int, checksum: int, from_seq: int, from_ns: int) -> Part:
        index = self.tried(lambda: RowIndex(self.objects, name, offset, size, checksum, chunk_cache(1)))
        return Part(name, offset, size, from_seq, from_ns, index)

    def tried(self, read: Callable[[], T]) -> T | None:
        """What it reads; None where that is damaged."""
        try:
            return read()
        except MissingObjectError as error:
            error.remember()
        except CorruptionError:
            pass  # whoever found it has noted it
        return None
