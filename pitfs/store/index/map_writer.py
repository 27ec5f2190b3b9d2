"""Writes the block maps of a snapshot: nodes one behind the other, then what the catalog knows of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
from xxhash import xxh3_64_intdigest

from pitfs.errors import CapacityError
from pitfs.model.blockmap import NODE_BYTES, I64Array, LoadNode, MapBuilder, MapEntry, Node, U64Array
from pitfs.model.transfer import Manifest, VolumeInfo
from pitfs.storage.files import write_all
from pitfs.store.objects.format import (
    HEADER_BYTES,
    MAX_UNITS,
    ObjectHeader,
    ObjectKind,
    ObjectRecord,
    pointer,
)
from pitfs.store.objects.publishing import complete

FLUSH_BYTES: Final = 1 << 20


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
    """

    def __init__(
        self, fd: int, snapshot_id: int, volumes: Sequence[VolumeInfo], roots_before: Sequence[MapEntry],
        load_node: LoadNode,
    ) -> None:  # fmt: skip
        self._fd, self._snapshot_id, self._volumes, self._load_node = fd, snapshot_id, volumes, load_node
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
        footer = msgspec.json.encode(MapFooter(manifest, tuple((root.pointer, root.checksum) for root in roots)))
        data_bytes = self._count * NODE_BYTES
        write_all(self._fd, footer, HEADER_BYTES + data_bytes)
        lengths = data_bytes, len(footer), xxh3_64_intdigest(footer)
        return roots, complete(self._fd, ObjectHeader(ObjectKind.MAP, history, self._snapshot_id, *lengths))

    def _end_volume(self) -> None:
        if self._builder is not None:
            self._roots[self._volume] = self._builder.finish()
            self._builder = None

    def _emit(self, node: Node) -> int:
        if self._count >= MAX_UNITS:
            raise CapacityError(f"snapshot {self._snapshot_id}: its map has more nodes than a pointer can count")
        self._buffer += node.data.cast("B")
        self._count += 1
        if len(self._buffer) >= FLUSH_BYTES:
            self._flush()
        return pointer(self._snapshot_id, self._count - 1)

    def _flush(self) -> None:
        offset = HEADER_BYTES + self._count * NODE_BYTES - len(self._buffer)
        write_all(self._fd, self._buffer, offset)
        self._buffer.clear()
