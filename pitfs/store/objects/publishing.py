"""Objects come to be: written in staging/, synced, renamed into objects/; only then may the catalog name them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from pitfs.model.ladder import LAST_LAYER
from pitfs.storage.files import fsync_directory, write_all
from pitfs.store.objects.format import ObjectHeader, ObjectKind, ObjectRecord, object_file


@contextmanager
def new_object(directory: str, kind: ObjectKind, snapshot_id: int, layer: int = LAST_LAYER) -> Iterator[int]:
    """The descriptor of a new file for an object, whose header is written when it is `complete`."""
    path = os.path.join(directory, object_file(kind, snapshot_id, layer))
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def complete(fd: int, header: ObjectHeader, layer: int = LAST_LAYER) -> ObjectRecord:
    """Writes the final header and makes the file durable; returns what the catalog is to know of it.

    Args:
        layer: of an index.
    """
    write_all(fd, header.encode(), 0)
    os.fsync(fd)
    return ObjectRecord(
        object_file(header.kind, header.snapshot_id, layer), header.kind, header.snapshot_id,
        header.data_bytes, header.footer_bytes, header.footer_checksum,
    )  # fmt: skip


def publish(staging: str, objects: str, records: Iterable[ObjectRecord]) -> None:
    """Moves complete files from a directory of staging/ to objects/.

    Both directories are synced, so the names are durable when this returns, and the catalog may be committed.
    """
    for record in records:
        os.rename(os.path.join(staging, record.name), os.path.join(objects, record.name))
    fsync_directory(objects)
    fsync_directory(staging)
