"""What a snapshot needs of the objects that were written between it and another one before it.

A content is stored once, in the interval that wrote it; so is a node of a block map. The snapshots that have it in a
given place are neighbours, the first of them the one at that interval's end: what was overwritten never comes back. So
when all snapshots between two go, of what was written between these two the later one needs what it has where it
differs from the earlier one, and nobody needs the rest. What was written before doesn't matter.

The walk goes down the two block maps together, node by node. What is live are sets of numbers (compressed bitmaps, a
bit for each at most): as large as the objects are, however long the walk.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Final

import numpy as np
from pyroaring import BitMap64

from pitfs.model.blockmap import NODE_BYTES, BlockMap, U64Array
from pitfs.store.objects.format import HEADER_BYTES, Layout, ObjectKind, ObjectName

BATCH_NODES: Final = 1 << 8  # looked at together: up to 1 MiB of pointers
RANGE_UNITS: Final = 1 << 16  # made an array of at a time


@dataclass(slots=True)
class Live:
    """Pointers to nodes, and to all units of contents, in objects with ids [first_id, end_id), by their kind."""

    layout: Layout
    first_id: int
    end_id: int
    pointers: dict[ObjectKind, BitMap64] = field(
        default_factory=lambda: {ObjectKind.MAP: BitMap64(), ObjectKind.SNAPSHOT_BLOCKS: BitMap64()}
    )

    def add(self, kind: ObjectKind, pointers: U64Array, units: int = 1) -> None:
        """Those of them that lead to these objects; `units` of a block."""
        objects_of_id = 1 if kind is ObjectKind.MAP else 2
        first, end = (objects_of_id * each << self.layout.unit_bits for each in (self.first_id, self.end_id))
        pointers = np.sort(pointers[(pointers >= first) & (pointers < end)])
        if units > 1:
            pointers = (pointers[:, None] + np.arange(units, dtype="<u8")).ravel()
        if len(pointers):
            numbers = array("Q")
            numbers.frombytes(pointers.tobytes())  # several times as fast as numpy's own
            self.pointers[kind].update(numbers)

    def ranges(self, name: ObjectName) -> Iterator[tuple[int, int]]:
        """Bytes [start, end) of an object that are live, as if it had a file of its own: ascending, coalesced."""
        if name.kind not in self.pointers:
            return
        pointers, layout = self.pointers[name.kind], self.layout
        is_map = name.kind is ObjectKind.MAP
        unit_bytes = NODE_BYTES if is_map else layout.unit_bytes
        first = layout.node_pointer(name.snapshot_id, 0) if is_map else layout.pointer(name)
        place, end = pointers.rank(first - 1), pointers.rank(first + layout.max_units - 1)
        held: tuple[int, int] | None = None
        for start in range(place, end, RANGE_UNITS):
            part = np.array(pointers[start : min(start + RANGE_UNITS, end)].to_array(), "<u8") - np.uint64(first)
            cuts = np.flatnonzero(np.diff(part) != 1)
            lows, highs = part[np.append(0, cuts + 1)], part[np.append(cuts, len(part) - 1)] + np.uint64(1)
            for low, high in zip(lows.tolist(), highs.tolist(), strict=True):
                low, high = HEADER_BYTES + low * unit_bytes, HEADER_BYTES + high * unit_bytes
                if held is not None and held[1] == low:
                    low = held[0]
                elif held is not None:
                    yield held
                held = low, high
        if held is not None:
            yield held


def live_between(
    before: Sequence[BlockMap], after: Sequence[BlockMap], block_units: Sequence[int], live: Live
) -> Live:
    """Adds what the maps `after` need of objects that were written behind those of `before`, which may be empty.

    Args:
        before, after: of the volumes, in order. block_units: units of a block, by volume.

    Raises:
        CorruptionError: a node isn't what was written.
    """
    for one, other, units in zip(before, after, block_units, strict=True):
        nodes: list[int] = []
        contents = [np.zeros(0, "<u8")]
        for level, node, pointers in chain(one.new_nodes(other), ((-1, 0, contents[0]),)):  # the last one ends it
            nodes.append(node)
            contents += [] if level else [pointers]
            if len(nodes) >= BATCH_NODES or level < 0:
                live.add(ObjectKind.MAP, np.array(nodes, "<u8"))
                live.add(ObjectKind.SNAPSHOT_BLOCKS, np.concatenate(contents), units)
                nodes, contents = [], contents[:1]
    return live
