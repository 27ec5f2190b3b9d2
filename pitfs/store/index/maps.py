"""Block maps of snapshots as objects: nodes one behind the other, then what the catalog knows of the snapshot.

Nodes are read as they are needed, verified, and kept in a bounded cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from pitfs.errors import CapacityError
from pitfs.model import blockmap
from pitfs.model.blockmap import (
    FANOUT,
    FANOUT_BITS,
    NODE_BYTES,
    BlockMap,
    I64Array,
    LoadNode,
    MapEntry,
    Node,
    U64Array,
)
from pitfs.model.transfer import Manifest, VolumeInfo
from pitfs.storage.files import write_all
from pitfs.store.objects.format import HEADER_BYTES, Layout, ObjectKind, ObjectName
from pitfs.store.objects.pool import ObjectPool

MAX_CACHED_NODES: Final = 512  # 4 MiB: the maps of 1 GiB at 4 KiB blocks, or the inner nodes of 500
FLUSH_BYTES: Final = 1 << 20


def node_loader(objects: ObjectPool) -> LoadNode:
    """Reads nodes of all maps of a store, by their pointer: snapshots share nodes, so they share the cache.

    A node is read-only. CorruptionError is raised where it isn't what the pointer was made for.
    """

    object_of, number_of = objects.layout.object_of, objects.layout.unit_of

    @lru_cache(MAX_CACHED_NODES)
    def load(pointer: int, checksum: int) -> Node:
        name = ObjectName(ObjectKind.MAP, object_of(pointer))
        offset = HEADER_BYTES + number_of(pointer) * NODE_BYTES
        return blockmap.decode_node(objects.read_verified(name, NODE_BYTES, offset, checksum))

    return load


def block_maps(load_node: LoadNode, roots: Sequence[MapEntry], volumes: Sequence[VolumeInfo]) -> list[BlockMap]:
    """The maps of a snapshot's volumes, one for each root."""
    return [BlockMap(root, volume.block_count, load_node) for root, volume in zip(roots, volumes, strict=True)]


def look_up(
    maps: Sequence[BlockMap], volumes: npt.NDArray[np.uint16], blocks: I64Array
) -> tuple[U64Array, U64Array]:
    """Pointers and checksums that ascending blocks have in the maps of their volumes: leaf by leaf."""
    pointers, checksums = np.zeros((2, len(blocks)), "<u8")
    leaves = blocks >> FANOUT_BITS
    cuts = np.flatnonzero((volumes[1:] != volumes[:-1]) | (leaves[1:] != leaves[:-1])) + 1
    for part in np.split(np.arange(len(blocks)), cuts) if len(blocks) else ():
        leaf = maps[int(volumes[part[0]])].leaf(int(leaves[part[0]]))
        pointers[part], checksums[part] = leaf[:, blocks[part] & (FANOUT - 1)]
    return pointers, checksums


class MapFooter(msgspec.Struct, frozen=True):
    """What stands behind the nodes of a map, as JSON: all that the catalog knows of this snapshot."""

    manifest: Manifest
    roots: tuple[tuple[int, int], ...]  # pointer, checksum of each volume


class MapWriter:
    """Makes the block maps of a snapshot from sorted updates of those before.

    Args:
        fd: of the new object, written through a bounded buffer.
        roots_before: of the snapshot before, EMPTY for a full copy.
        load_node: reads nodes of committed maps.
        layout: of the store.
    """

    def __init__(
        self, fd: int, snapshot_id: int, volumes: Sequence[VolumeInfo], roots_before: Sequence[MapEntry],
        load_node: LoadNode, layout: Layout,
    ) -> None:  # fmt: skip
        self._layout = layout
        self._fd, self._snapshot_id, self._volumes, self._load_node = fd, snapshot_id, volumes, load_node
        self._count = 0
        self._buffer = bytearray()
        self._roots = list(roots_before)
        self._volume = -1
        self._builder: blockmap.MapBuilder | None = None

    def update(self, volume: int, blocks: I64Array, pointers: U64Array, checksums: U64Array) -> None:
        """Sets entries of a volume's blocks; (volume, block) strictly ascend over all calls."""
        if volume != self._volume:
            self._end_volume()
            self._volume = volume
            self._builder = blockmap.MapBuilder(
                self._volumes[volume].block_count, self._roots[volume], self._load_node, self._emit
            )
        assert self._builder is not None
        self._builder.update(blocks, pointers, checksums)

    def finish(self, manifest: Manifest) -> tuple[tuple[MapEntry, ...], tuple[int, int, int]]:
        """Writes what is left, and the footer; the roots, and (data_bytes, footer_bytes, footer_checksum)."""
        self._end_volume()
        self._flush()
        roots = tuple(self._roots)
        footer = msgspec.json.encode(MapFooter(manifest, tuple((root.pointer, root.checksum) for root in roots)))
        data_bytes = self._count * NODE_BYTES
        write_all(self._fd, footer, HEADER_BYTES + data_bytes)
        return roots, (data_bytes, len(footer), xxh3_64_intdigest(footer))

    def _end_volume(self) -> None:
        if self._builder is not None:
            self._roots[self._volume] = self._builder.finish()
            self._builder = None

    def _emit(self, node: Node) -> int:
        if self._count >= self._layout.max_units:
            raise CapacityError(f"snapshot {self._snapshot_id}: its map has more nodes than a pointer can count")
        self._buffer += node.data.cast("B")
        self._count += 1
        if len(self._buffer) >= FLUSH_BYTES:
            self._flush()
        return self._layout.node_pointer(self._snapshot_id, self._count - 1)

    def _flush(self) -> None:
        offset = HEADER_BYTES + self._count * NODE_BYTES - len(self._buffer)
        write_all(self._fd, self._buffer, offset)
        self._buffer.clear()
