"""What those need who add to a store: its catalog, its objects, and whose it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pitfs.model.blockmap import I64Array
from pitfs.model.ladder import LAST_LAYER
from pitfs.model.transfer import VolumeInfo
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.index.block_maps import NodeReader
from pitfs.store.objects.format import ObjectHeader, ObjectKind, ObjectRecord
from pitfs.store.objects.pool import ObjectPool
from pitfs.store.objects.publishing import complete, publish


@dataclass(frozen=True, slots=True)
class WritableStore:
    """A store that this process writes.

    Attributes:
        history: 16 bytes.
        volumes: of the group.
    """

    catalog: Catalog
    objects: ObjectPool
    nodes: NodeReader
    history: bytes
    volumes: tuple[VolumeInfo, ...]

    @property
    def block_sizes(self) -> I64Array:
        """Bytes, by volume."""
        return np.array([volume.block_size for volume in self.volumes], "<i8")

    def complete(
        self, fd: int, kind: ObjectKind, snapshot_id: int, *lengths: int, layer: int = LAST_LAYER
    ) -> ObjectRecord:
        """Writes an object's header and makes it durable. `lengths`: data_bytes, and what the footer has."""
        return complete(fd, ObjectHeader(kind, self.history, snapshot_id, *lengths), layer)

    def publish(self, directory: str, records: Iterable[ObjectRecord]) -> None:
        """Moves complete objects from a directory of staging/ to objects/, durably."""
        publish(directory, self.objects.directory, records)
