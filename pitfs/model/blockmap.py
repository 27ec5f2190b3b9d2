"""Block map: a persistent radix tree (a page table) from a volume's blocks to their contents. Pure.

One tree for each volume and snapshot. A node is 512 pointers followed by 512 checksums:

    offset  size
       0    4096   pointer,  512 × uint64
    4096    4096   checksum, 512 × uint64

In a leaf entry i is a block: where its content stands and the xxh3_64 of it. In an inner node entry i is a
node one level down: where it stands and the xxh3_64 of its 8192 bytes, so a root's checksum vouches for the
whole tree. Pointer 0 (its checksum is 0 too) means zeros: a block of them, or an empty subtree.

A tree is never changed. A new one is made from the one before and a sorted stream of updates: only nodes on
the paths to updated blocks are made anew, all others are shared. At any time the builder holds one node for
each level, however large the volume.
"""

from __future__ import annotations

from collections.abc import Callable
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
    """What leads to a node (or a block): a pointer and the checksum of what stands there; 0, 0: zeros."""

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
    depth = 1
    while block_count > 1 << (FANOUT_BITS * depth):
        depth += 1
    return depth


def find_leaf(root: MapEntry, block_count: int, leaf_index: int, load_node: LoadNode) -> Node | None:
    """The leaf of blocks [leaf_index * 512, + 512), None if all of them are zeros.

    Raises:
        CorruptionError: by `load_node`.
    """
    entry = root
    for level in range(tree_depth(block_count) - 1, 0, -1):
        if entry.pointer == 0:
            return None
        node = load_node(entry.pointer, entry.checksum)
        slot = (leaf_index >> (FANOUT_BITS * (level - 1))) & (FANOUT - 1)
        entry = MapEntry(int(node[POINTERS, slot]), int(node[CHECKSUMS, slot]))
    return load_node(entry.pointer, entry.checksum) if entry.pointer else None


def next_difference(one: MapEntry, other: MapEntry, block_count: int, first: int, load_node: LoadNode) -> int | None:
    """Index of the first leaf, not before leaf `first`, in which two trees may differ; None if there is none.

    What they share is passed over, and what is empty in both: nodes on two paths of each are read, however much lies
    between, and more only where the same contents were written at two places.

    Args:
        one, other: roots of trees for volumes of `block_count` blocks.

    Raises:
        CorruptionError: by `load_node`.
    """
    level = tree_depth(block_count) - 1
    return _next_difference(one, other, level, first, load_node) if first >> (FANOUT_BITS * level) == 0 else None


def _next_difference(one: MapEntry, other: MapEntry, level: int, first: int, load_node: LoadNode) -> int | None:
    """As `next_difference` in subtrees that have so many levels above their leaves."""
    if one == other or not level:
        return None if one == other else first
    nodes = [load_node(entry.pointer, entry.checksum) if entry.pointer else _NO_ENTRIES for entry in (one, other)]
    shift = FANOUT_BITS * (level - 1)
    slot = first >> shift
    differs = (nodes[0][:, slot:] != nodes[1][:, slot:]).any(axis=0)
    for here in (np.flatnonzero(differs) + slot).tolist():
        within = first - (slot << shift) if here == slot else 0
        children = [MapEntry(int(node[POINTERS, here]), int(node[CHECKSUMS, here])) for node in nodes]
        found = _next_difference(children[0], children[1], level - 1, within, load_node)
        if found is not None:
            return int((here << shift) + found)
    return None


def next_leaf(root: MapEntry, block_count: int, first: int, load_node: LoadNode) -> int | None:
    """Index of the first leaf, not before leaf `first`, that isn't all zeros; None if there is none.

    Raises:
        CorruptionError: by `load_node`.
    """
    return next_difference(EMPTY, root, block_count, first, load_node)


class MapBuilder:
    """Makes the tree that results from applying sorted updates to another.

    Args:
        block_count: blocks of the volume.
        root: the tree before, EMPTY for none.
        load_node: reads a node of the tree before.
        emit_node: writes a new node, children before their parents, and says where it stands.
    """

    def __init__(self, block_count: int, root: MapEntry, load_node: LoadNode, emit_node: EmitNode) -> None:
        self._depth = tree_depth(block_count)
        self._root = root
        self._load_node = load_node
        self._emit_node = emit_node
        self._path: list[Node] = []  # root first; a leaf last when it is complete
        self._leaf_index = -1

    def update(self, blocks: I64Array, pointers: U64Array, checksums: U64Array) -> None:
        """Sets entries. `blocks` strictly ascend, also from call to call; where a pointer is 0 so must be the
        checksum. Shapes (n,)."""
        leaves = blocks >> FANOUT_BITS
        bounds = np.flatnonzero(leaves[1:] != leaves[:-1]) + 1
        slots = blocks & (FANOUT - 1)
        starts = [0, *bounds.tolist()]
        ends = [*bounds.tolist(), len(blocks)]
        if not len(blocks):
            return
        for start, end, leaf_index in zip(starts, ends, leaves[starts].tolist(), strict=True):
            if leaf_index != self._leaf_index:
                self._move_to(leaf_index)
            leaf = self._path[-1]
            leaf[POINTERS, slots[start:end]] = pointers[start:end]
            leaf[CHECKSUMS, slots[start:end]] = checksums[start:end]

    def finish(self) -> MapEntry:
        """Emits what is open and returns the root; the root before if nothing was updated."""
        while self._path:
            self._close_last()
        return self._root

    def _move_to(self, leaf_index: int) -> None:
        """Closes nodes that don't lead to the leaf, opens those that do."""
        if self._path:
            differing = leaf_index ^ self._leaf_index
            keep = self._depth - 1  # inner nodes shared by both paths
            while keep and differing >> (FANOUT_BITS * (self._depth - keep)):
                keep -= 1
            keep = max(keep, 1) if self._depth > 1 else 0
            while len(self._path) > keep:
                self._close_last()
        self._leaf_index = leaf_index
        while len(self._path) < self._depth:
            entry = self._child(len(self._path))
            node = self._load_node(entry.pointer, entry.checksum).copy() if entry.pointer else new_node()
            self._path.append(node)

    def _slot(self, level: int) -> int:
        """Where in the node at `level` (0 the root) the open path goes on."""
        return (self._leaf_index >> (FANOUT_BITS * (self._depth - 2 - level))) & (FANOUT - 1)

    def _child(self, level: int) -> MapEntry:
        """What leads to the node at `level` of the open path."""
        if level == 0:
            return self._root
        parent, slot = self._path[level - 1], self._slot(level - 1)
        return MapEntry(int(parent[POINTERS, slot]), int(parent[CHECKSUMS, slot]))

    def _close_last(self) -> None:
        node = self._path.pop()
        entry = EMPTY
        if node[POINTERS].any():
            entry = MapEntry(self._emit_node(node), xxh3_64_intdigest(node.data))
        level = len(self._path)
        if level == 0:
            self._root = entry
            return
        parent, slot = self._path[level - 1], self._slot(level - 1)
        parent[POINTERS, slot] = entry.pointer
        parent[CHECKSUMS, slot] = entry.checksum
