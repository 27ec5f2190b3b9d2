"""A store that this process writes: what those need who add to it, and how objects come to be."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from pitfs.model.blockmap import I64Array, LoadNode, U64Array
from pitfs.model.transfer import VolumeInfo
from pitfs.storage.files import fsync_directory, open_fd, write_all
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.objects.format import Layout, ObjectHeader, ObjectKind, ObjectName, ObjectRecord
from pitfs.store.objects.pool import ObjectPool

MAX_FOLDERS: Final = 64  # remembered: new objects go to one or two, layers to those of old intervals


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
        folders: of objects/ that this process knows to be durable.
    """

    catalog: Catalog
    objects: ObjectPool
    load_node: LoadNode
    history: bytes
    volumes: tuple[VolumeInfo, ...]
    folders: set[str] = field(default_factory=set)

    @property
    def layout(self) -> Layout:
        return self.objects.layout

    @property
    def block_sizes(self) -> I64Array:
        """Bytes, by volume."""
        return np.array([volume.block_size for volume in self.volumes], "<i8")

    @property
    def block_units(self) -> U64Array:
        """Units of a block, by volume."""
        return (self.block_sizes // self.layout.unit_bytes).astype("<u8")

    def path_for(self, name: ObjectName) -> str:
        """Where an object will be; its folder is there, and durable but for what is in it."""
        path = self.objects.path_of(name)
        self._make_folder(os.path.dirname(path))
        return path

    def _make_folder(self, folder: str) -> None:
        if folder in self.folders:
            return
        directory, above = self.objects.directory, os.path.dirname(folder)
        if folder != directory:
            for each in (above, folder):
                with suppress(FileExistsError):
                    os.mkdir(each, 0o700)
            for each in (above, directory):  # each time: a kill may have come before it
                fsync_directory(each)
        if len(self.folders) >= MAX_FOLDERS:
            self.folders.clear()
        self.folders.add(folder)

    def complete(self, fd: int, name: ObjectName, *lengths: int, synced: bool = True) -> ObjectRecord:
        """Writes an object's header and makes the file durable; returns what the catalog is to know of it.

        Contents of a journal grow by layers. Their header says nothing of it, so that it never changes under readers.

        Args:
            lengths: data_bytes, and footer_bytes and footer_checksum where it has a footer.
            synced: else the caller syncs it.
        """
        in_header = () if name.kind is ObjectKind.JOURNAL_BLOCKS else lengths
        write_all(fd, ObjectHeader(name.kind, self.history, name.snapshot_id, *in_header).encode(), 0)
        if synced:
            os.fsync(fd)
        return ObjectRecord(name.file, name.kind, name.snapshot_id, *lengths)

    def publish(self, directory: str, records: Iterable[ObjectRecord]) -> None:
        """Moves complete objects from a directory of staging/ to objects/.

        Both sides are synced, so the names are durable when this returns, and the catalog may be committed.
        """
        folders = set[str]()
        for record in records:
            path = os.path.join(self.objects.directory, self.layout.path_of(record.name))
            folders.add(os.path.dirname(path))
            self._make_folder(os.path.dirname(path))
            os.rename(os.path.join(directory, record.name), path)
        for each in sorted(folders):
            fsync_directory(each)
        fsync_directory(directory)
