"""Block maps of committed snapshots: nodes are read as needed, verified, and kept in a bounded cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final

from pitfs.model.blockmap import NODE_BYTES, BlockMap, MapEntry, Node, decode_node
from pitfs.model.transfer import VolumeInfo
from pitfs.store.objects.cache import Cache
from pitfs.store.objects.format import HEADER_BYTES, ObjectKind, pointer_object, pointer_unit
from pitfs.store.objects.pool import ObjectPool

MAX_CACHED_NODES: Final = 512  # 4 MiB: the maps of 1 GiB at 4 KiB blocks, or the inner nodes of 500


class NodeReader:
    """Nodes of all maps of a store, by their pointer: snapshots share nodes, so they share the cache."""

    def __init__(self, objects: ObjectPool) -> None:
        self._objects = objects
        self._cache: Cache[int, Node] = Cache(MAX_CACHED_NODES)

    def load(self, pointer: int, checksum: int) -> Node:
        """The node at `pointer`, read-only.

        Raises:
            CorruptionError: what is there isn't what the pointer was made for.
        """
        return self._cache.get(pointer, partial(self._read, pointer, checksum))

    def _read(self, pointer: int, checksum: int) -> Node:
        offset = HEADER_BYTES + pointer_unit(pointer) * NODE_BYTES
        snapshot_id = pointer_object(pointer)
        return decode_node(
            self._objects.read_verified(ObjectKind.MAP, snapshot_id, NODE_BYTES, offset, checksum)
        )


def block_maps(nodes: NodeReader, roots: Sequence[MapEntry], volumes: Sequence[VolumeInfo]) -> list[BlockMap]:
    """The maps of a snapshot's volumes, one for each root."""
    return [BlockMap(root, volume.block_count, nodes.load) for root, volume in zip(roots, volumes, strict=True)]
