"""A transfer that is complete in staging becomes objects and rows of the catalog.

Snapshots come with their block map and the contents of their diff; layers with a finer index, and contents behind
those that the journal has. The catalog's commit is the moment from which any of it can be seen.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Final

from pitfs.errors import CorruptionError
from pitfs.model.blockmap import EMPTY
from pitfs.model.ladder import layer_of
from pitfs.model.transfer import Section, TransferKind, VolumeInfo
from pitfs.storage.files import fsync_directory, read_exactly, write_all
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.catalog.records import Commit, Interval, LayersCommit, Snapshot
from pitfs.store.index.block_maps import NodeReader, SnapshotMap
from pitfs.store.index.reader import JournalIndex, chunk_cache
from pitfs.store.objects.format import HEADER_BYTES, ObjectHeader, ObjectKind, ObjectRecord, object_file
from pitfs.store.objects.pool import ObjectPool
from pitfs.store.objects.publishing import complete
from pitfs.store.transfer.build import build
from pitfs.store.transfer.layers import LayersBuilder, interval_of
from pitfs.store.transfer.staging import StagedTransfer

COPY_BYTES: Final = 1 << 20


class Committer:
    """Commits staged transfers of one store.

    Args:
        history: 16 bytes.
        volumes: of the group.
    """

    def __init__(
        self, catalog: Catalog, objects: ObjectPool, nodes: NodeReader, history: bytes, volumes: Sequence[VolumeInfo]
    ) -> None:
        self._catalog, self._objects, self._nodes = catalog, objects, nodes
        self._history, self._volumes = history, volumes

    def commit(self, staged: StagedTransfer) -> None:
        """Makes its objects and commits them; when it returns the transfer survives power loss.

        Args:
            staged: finished (`StagedTransfer.finish`).

        Raises:
            PositionMismatchError: the interval of its layers isn't there any more, or isn't what they build on.
            RemoteProtocolError: it can't be.
            CorruptionError: what is staged, or what it builds on, is damaged.
            CapacityError, OSError: the disk is full, or refuses.
        """
        if staged.manifest.kind is TransferKind.LAYERS:
            self._layers(staged)
        else:
            self._snapshot(staged)

    def _snapshot(self, staged: StagedTransfer) -> None:
        catalog, m = self._catalog, staged.manifest
        last = catalog.last_snapshot()
        if m.kind is TransferKind.INTERVAL and m.to_seq == m.from_seq:
            catalog.commit(Commit(m, None))
            return
        fresh = last is None or m.kind is TransferKind.FULL
        roots = [EMPTY] * len(self._volumes) if fresh or last is None else catalog.roots(last.id)
        built = build(staged, self._history, self._volumes, roots, self._nodes.load)
        self._publish(staged.directory, built.objects)
        snapshot = Snapshot(staged.snapshot, m.to_seq, m.to_time_ns, m.mark)
        interval = None
        if last is not None:
            positions = last.seq, last.time_ns, m.to_seq, m.to_time_ns
            interval = Interval(staged.snapshot, last.id, *positions, m.first_time_ns, None, m.cause, 0)
        catalog.commit(Commit(m, snapshot, built.roots, interval, built.objects, built.minutes))

    def _layers(self, staged: StagedTransfer) -> None:
        catalog, m = self._catalog, staged.manifest
        base = interval_of(catalog, m)
        if m.granularity_ns == m.base_granularity_ns:
            catalog.commit_layers(LayersCommit(base, replace(base, cause=m.cause), (), None, {}))
            return
        layer, replaced, before = layer_of(m.granularity_ns), None, None
        if base.granularity_ns is not None:
            replaced = object_file(ObjectKind.JOURNAL_INDEX, base.end_snapshot_id, base.layer)
            facts = catalog.object(replaced)
            if facts is None:
                raise CorruptionError(catalog.path, 0, f"it lists an interval but not {replaced}")
            before = JournalIndex(self._objects, base, facts, chunk_cache())
        fourth = SnapshotMap(self._nodes, catalog.roots(base.end_snapshot_id), self._volumes)
        built = LayersBuilder(
            staged, self._history, self._volumes, base, before, fourth, self._objects
        ).build(layer)
        objects = (*self._add_contents(staged), built.index)
        self._publish(staged.directory, (built.index,))
        interval = replace(base, granularity_ns=m.granularity_ns, cause=m.cause, journal_rows=built.row_count)
        catalog.commit_layers(LayersCommit(base, interval, objects, replaced, built.minutes))
        if replaced is not None:
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(self._objects.directory, replaced))

    def _add_contents(self, staged: StagedTransfer) -> tuple[ObjectRecord, ...]:
        """Puts the layers' contents behind those that the journal has: what is committed of it stays as it is."""
        base_bytes, length = staged.manifest.base_bytes, staged.lengths[Section.JOURNAL_BLOCKS - 1]
        if not length:
            return ()
        header = ObjectHeader(ObjectKind.JOURNAL_BLOCKS, self._history, staged.snapshot, base_bytes + length)
        staged_fd = staged.fd(Section.JOURNAL_BLOCKS)
        if not base_bytes:
            facts = complete(staged_fd, header)
            self._publish(staged.directory, (facts,))
            return (facts,)
        name = object_file(header.kind, header.snapshot_id)
        fd = os.open(os.path.join(self._objects.directory, name), os.O_RDWR | os.O_CLOEXEC)
        try:
            for at in range(0, length, COPY_BYTES):
                data = read_exactly(staged_fd, min(COPY_BYTES, length - at), HEADER_BYTES + at, staged.directory)
                write_all(fd, data, HEADER_BYTES + base_bytes + at)
            return (complete(fd, header),)
        finally:
            os.close(fd)

    def _publish(self, directory: str, objects: Sequence[ObjectRecord]) -> None:
        """Moves the synced files to objects/; durable before the catalog names them."""
        for facts in objects:
            os.rename(os.path.join(directory, facts.name), os.path.join(self._objects.directory, facts.name))
        fsync_directory(self._objects.directory)
        fsync_directory(directory)
