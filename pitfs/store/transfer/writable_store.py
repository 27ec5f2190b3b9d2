"""A store that this process writes: what those need who add to it, and how objects come to be."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np

from pitfs.model.blockmap import I64Array, LoadNode
from pitfs.model.transfer import VolumeInfo
from pitfs.storage.files import fsync_directory, open_fd, write_all
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.objects.format import ObjectHeader, ObjectName, ObjectRecord
from pitfs.store.objects.pool import ObjectPool


def new_object(directory: str, name: ObjectName) -> AbstractContextManager[int]:
    """The descriptor of a new file for an object, whose header is written by `WritableStore.complete`."""
    return open_fd(os.path.join(directory, name.file), os.O_RDWR | os.O_CREAT | os.O_TRUNC)


@dataclass(frozen=True, slots=True)
class WritableStore:
    """Its catalog, its objects, and whose it is.

    Objects are written in staging/, synced, renamed into objects/; only then may the catalog name them.

    Attributes:
        load_node: reads nodes of committed block maps.
        history: 16 bytes.
        volumes: of the group.
    """

    catalog: Catalog
    objects: ObjectPool
    load_node: LoadNode
    history: bytes
    volumes: tuple[VolumeInfo, ...]

    @property
    def block_sizes(self) -> I64Array:
        """Bytes, by volume."""
        return np.array([volume.block_size for volume in self.volumes], "<i8")

    def complete(self, fd: int, name: ObjectName, *lengths: int) -> ObjectRecord:
        """Writes an object's header and makes the file durable; returns what the catalog is to know of it.

        Args:
            lengths: data_bytes, and footer_bytes and footer_checksum where it has a footer.
        """
        write_all(fd, ObjectHeader(name.kind, self.history, name.snapshot_id, *lengths).encode(), 0)
        os.fsync(fd)
        return ObjectRecord(name.file, name.kind, name.snapshot_id, *lengths)

    def publish(self, directory: str, records: Iterable[ObjectRecord]) -> None:
        """Moves complete objects from a directory of staging/ to objects/.

        Both directories are synced, so the names are durable when this returns, and the catalog may be committed.
        """
        for record in records:
            os.rename(os.path.join(directory, record.name), os.path.join(self.objects.directory, record.name))
        fsync_directory(self.objects.directory)
        fsync_directory(directory)
