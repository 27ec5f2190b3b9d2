"""Block maps of committed snapshots: nodes are read as needed, verified, and kept in a bounded cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from pitfs.model.blockmap import (
    CHECKSUMS,
    NODE_BYTES,
    POINTERS,
    MapEntry,
    Node,
    U64Array,
    decode_node,
    find_leaf,
    new_node,
    next_difference,
    next_leaf,
)
from pitfs.model.transfer import VolumeInfo
from pitfs.store.objects.cache import Cache
from pitfs.store.objects.format import HEADER_BYTES, ObjectKind, pointer_object, pointer_unit
from pitfs.store.objects.pool import ObjectPool

MAX_CACHED_NODES: Final = 512  # 4 MiB: the maps of 1 GiB at 4 KiB blocks, or the inner nodes of 500
_ZEROS: Final = new_node()
_ZEROS.setflags(write=False)


class NodeReader:
    """Nodes of all maps of a store, by their pointer: snapshots share nodes, so they share the cache."""

    def __init__(self, objects: ObjectPool, limit: int = MAX_CACHED_NODES) -> None:
        self._objects = objects
        self._cache: Cache[int, Node] = Cache(limit)

    def load(self, pointer: int, checksum: int) -> Node:
        """The node at `pointer`, read-only.

        Raises:
            CorruptionError: what stands there isn't what the pointer was made for.
        """
        return self._cache.get(pointer, lambda: self._read(pointer, checksum))

    def _read(self, pointer: int, checksum: int) -> Node:
        offset = HEADER_BYTES + pointer_unit(pointer) * NODE_BYTES
        snapshot = pointer_object(pointer)
        return decode_node(
            self._objects.read_verified(ObjectKind.MAP, snapshot, NODE_BYTES, offset, checksum)
        )


class SnapshotMap:
    """The block maps of one snapshot's volumes.

    Args:
        nodes: where nodes come from.
        roots: one for each volume.
        volumes: of the group.
    """

    def __init__(self, nodes: NodeReader, roots: Sequence[MapEntry], volumes: Sequence[VolumeInfo]) -> None:
        self._nodes = nodes
        self.roots = tuple(roots)
        self._block_counts = [volume.block_count for volume in volumes]

    def leaf(self, volume: int, leaf_index: int) -> tuple[U64Array, U64Array]:
        """Pointers and checksums, each uint64[512] and read-only, of blocks [leaf_index * 512, + 512).

        Raises:
            CorruptionError: a node on the way isn't what was written.
        """
        node = find_leaf(self.roots[volume], self._block_counts[volume], leaf_index, self._nodes.load)
        if node is None:
            node = _ZEROS
        return node[POINTERS], node[CHECKSUMS]

    def next_leaf(self, volume: int, first: int) -> int | None:
        """Index of the first leaf, not before `first`, that isn't all zeros. Raises as `leaf`."""
        return next_leaf(self.roots[volume], self._block_counts[volume], first, self._nodes.load)

    def next_difference(self, other: SnapshotMap, volume: int, first: int) -> int | None:
        """Index of the first leaf, not before `first`, in which another snapshot may differ. Raises as `leaf`."""
        roots = self.roots[volume], other.roots[volume]
        return next_difference(*roots, self._block_counts[volume], first, self._nodes.load)
