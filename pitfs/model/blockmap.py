"""Block map: a persistent radix tree (a page table) from a volume's blocks to their contents. Pure.

There is one tree for each volume and snapshot. A node is 512 pointers followed by 512 checksums:

    offset  size
       0    4096   pointer,  512 × uint64
    4096    4096   checksum, 512 × uint64

In a leaf, entry i is a block: where its content is, and the xxh3_64 of it. In an inner node, entry i is a node one
level down: where it is, and the xxh3_64 of its 8192 bytes. So a root's checksum vouches for the whole tree. Pointer 0
(its checksum is 0 too) means zeros: a block of them, or an empty subtree.

A leaf's index is its first block >> 9. The bits of that index, nine at a time from the top, are the slots that lead
from the root down to the leaf.

A tree never changes. A new one is made from the one before and a sorted stream of updates: only the nodes on the paths
to updated blocks are made anew, the new tree shares all others with the one before.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

FANOUT_BITS: Final = 9
FANOUT: Final = 1 << FANOUT_BITS
NODE_BYTES: Final = FANOUT * 16
POINTERS: Final = 0  # row of a node
CHECKSUMS: Final = 1

U64Array = npt.NDArray[np.uint64]
I64Array = npt.NDArray[np.int64]
Node = U64Array  # shape (2, 512)


@dataclass(frozen=True, slots=True)
class MapEntry:
    """What leads to a node (or a block): a pointer and the checksum of what is there; 0, 0: zeros."""

    pointer: int = 0
    checksum: int = 0


EMPTY: Final = MapEntry()

LoadNode = Callable[[int, int], Node]  # (pointer, checksum) -> verified node, not to be written to
EmitNode = Callable[[Node], int]  # node -> its pointer, never 0


def new_node() -> Node:
    return np.zeros((2, FANOUT), "<u8")


_NO_ENTRIES: Final = new_node()
_NO_ENTRIES.setflags(write=False)


def decode_node(data: bytes) -> Node:
    """The node in 8192 bytes, read-only."""
    return np.frombuffer(data, "<u8").reshape(2, FANOUT)


def tree_depth(block_count: int) -> int:
    """Levels of nodes for a volume of that many blocks, at least 1 (leaves only)."""
    return max(1, -(-(block_count - 1).bit_length() // FANOUT_BITS))


def _entry(node: Node, slot: int) -> MapEntry:
    return MapEntry(int(node[POINTERS, slot]), int(node[CHECKSUMS, slot]))


@dataclass(frozen=True, slots=True)
class BlockMap:
    """A tree as readers see it. Methods raise what `load_node` raises: CorruptionError.

    Attributes:
        block_count: of the volume.
    """

    root: MapEntry
    block_count: int
    load_node: LoadNode

    @property
    def leaf_count(self) -> int:
        return -(-self.block_count // FANOUT)

    def leaf(self, leaf_index: int) -> Node:
        """The leaf of blocks [leaf_index * 512, + 512), read-only."""
        entry = self.root
        for level in range(tree_depth(self.block_count) - 1, 0, -1):
            if not entry.pointer:
                break
            slot = (leaf_index >> (FANOUT_BITS * (level - 1))) & (FANOUT - 1)
            entry = _entry(self.load_node(entry.pointer, entry.checksum), slot)
        return self._node(entry)

    def next_leaf(self, first: int) -> int | None:
        """Index of the first leaf, not before leaf `first`, that isn't all zeros; None if there is none."""
        return BlockMap(EMPTY, self.block_count, self.load_node).next_difference(self, first)

    def next_difference(self, other: BlockMap, first: int) -> int | None:
        """Index of the first leaf, not before leaf `first`, in which two trees may differ; None if there is none.

        Both trees are walked down together, and only into entries that differ. Equal entries lead to the same node, so
        what the trees share, and what is empty in both, costs nothing however large it is. The walk goes down to the
        leaf `first`, finds the next difference, and goes down to that: so it reads the nodes on two paths of each
        tree. It reads more only where the same contents were written at two places: there the entries differ by their
        pointers, and the walk comes back from below without a difference.

        Args:
            other: of a volume of the same size.
        """
        level = tree_depth(self.block_count) - 1
        if first >> (FANOUT_BITS * level):
            return None
        return self._next_difference(self.root, other.root, level, first)

    def _next_difference(self, one: MapEntry, other: MapEntry, level: int, first: int) -> int | None:
        """As `next_difference`, in the subtrees of two entries; they have `level` levels above their leaves."""
        if one == other:
            return None
        if not level:
            return first
        nodes = self._node(one), self._node(other)
        shift = FANOUT_BITS * (level - 1)  # an entry of these nodes covers 1 << shift leaves
        first_slot = first >> shift
        differs = (nodes[0][:, first_slot:] != nodes[1][:, first_slot:]).any(axis=0)
        for slot in (np.flatnonzero(differs) + first_slot).tolist():
            within = first - (slot << shift) if slot == first_slot else 0
            found = self._next_difference(_entry(nodes[0], slot), _entry(nodes[1], slot), level - 1, within)
            if found is not None:
                return int((slot << shift) + found)
        return None

    def new_nodes(self, other: BlockMap) -> Iterator[tuple[int, int, U64Array]]:
        """The nodes of another tree that this one doesn't have in their places, parents first.

        Yields:
            the node's level above the leaves, its pointer, and the pointers in it that this tree doesn't have in their
            places and that aren't 0: uint64[n].
        """
        yield from self._new_nodes(self.root, other.root, tree_depth(self.block_count) - 1)

    def _new_nodes(self, one: MapEntry, other: MapEntry, level: int) -> Iterator[tuple[int, int, U64Array]]:
        if other.pointer in (0, one.pointer):
            return
        nodes = self._node(one), self._node(other)
        slots = np.flatnonzero((nodes[0][POINTERS] != nodes[1][POINTERS]) & (nodes[1][POINTERS] != 0))
        yield level, other.pointer, nodes[1][POINTERS, slots]
        for slot in slots.tolist() if level else ():
            yield from self._new_nodes(_entry(nodes[0], slot), _entry(nodes[1], slot), level - 1)

    def _node(self, entry: MapEntry) -> Node:
        return self.load_node(entry.pointer, entry.checksum) if entry.pointer else _NO_ENTRIES


class MapBuilder:
    """Makes the tree that results from applying sorted updates to another.

    It holds one node for each level, however large the volume is: the open path, from the root down to the leaf that
    updates go to. Updates ascend, so a leaf that they have passed is complete. When an update is for another leaf:

    1. The nodes that don't lead to the new leaf are closed, from the leaf upwards. A closed node is emitted, and its
       parent, which is still open, takes the pointer and the checksum of it.
    2. The path to the new leaf is opened downwards: each node is a copy of the one that the tree before has there, or
       a new one where it has none.

    `finish` closes the whole path; what leads to the root is the result. So every new node is emitted once, children
    before their parents, and a node that has no update below it is neither read nor written.

    Args:
        block_count: blocks of the volume.
        root: the tree before, EMPTY for none.
        load_node: reads a node of the tree before.
        emit_node: writes a new node, and says where it is.
    """

    def __init__(self, block_count: int, root: MapEntry, load_node: LoadNode, emit_node: EmitNode) -> None:
        self._depth = tree_depth(block_count)
        self._root = root
        self._load_node = load_node
        self._emit_node = emit_node
        self._path: list[Node] = []  # root first, leaf last; empty before the first update
        self._leaf_index = 0  # of the leaf at the end of the path

    def update(self, blocks: I64Array, pointers: U64Array, checksums: U64Array) -> None:
        """Sets entries. `blocks` strictly ascend, also from call to call; where a pointer is 0 so must be the
        checksum. Shapes (n,)."""
        if not len(blocks):
            return
        leaves, slots = blocks >> FANOUT_BITS, blocks & (FANOUT - 1)
        bounds = (np.flatnonzero(leaves[1:] != leaves[:-1]) + 1).tolist()
        for start, end in itertools.pairwise([0, *bounds, len(blocks)]):
            self._open(int(leaves[start]))
            leaf = self._path[-1]
            leaf[POINTERS, slots[start:end]] = pointers[start:end]
            leaf[CHECKSUMS, slots[start:end]] = checksums[start:end]

    def finish(self) -> MapEntry:
        """Emits what is open and returns the root; the root before if nothing was updated."""
        while self._path:
            self._close_last()
        return self._root

    def _open(self, leaf_index: int) -> None:
        """Makes the open path lead to that leaf."""
        # Nine bits of the index choose a slot on each level: from the highest bit that differs on, the paths part.
        highest_bit = (leaf_index ^ self._leaf_index).bit_length()
        shared = self._depth - -(-highest_bit // FANOUT_BITS)
        while len(self._path) > shared:
            self._close_last()
        self._leaf_index = leaf_index
        while len(self._path) < self._depth:
            entry = _entry(self._path[-1], self._last_slot()) if self._path else self._root
            node = self._load_node(entry.pointer, entry.checksum).copy() if entry.pointer else new_node()
            self._path.append(node)

    def _close_last(self) -> None:
        node, entry = self._path.pop(), EMPTY
        if node[POINTERS].any():
            entry = MapEntry(self._emit_node(node), xxh3_64_intdigest(node.data))
        if self._path:
            parent, slot = self._path[-1], self._last_slot()
            parent[POINTERS, slot] = entry.pointer
            parent[CHECKSUMS, slot] = entry.checksum
        else:
            self._root = entry

    def _last_slot(self) -> int:
        """Where in the last node of the path, an inner one, the way to the leaf goes on."""
        return (self._leaf_index >> (FANOUT_BITS * (self._depth - 1 - len(self._path)))) & (FANOUT - 1)
