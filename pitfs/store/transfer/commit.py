"""A transfer that is complete in staging becomes objects and rows of the catalog.

A snapshot comes with its block map, which is made by streaming over the sorted rows of the diff, and with the contents
of the diff. Layers come with a finer index, and with contents that go behind those that the journal has. The catalog's
commit is the moment from which any of it can be seen.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from typing import Final

import numpy as np

from pitfs.errors import CorruptionError
from pitfs.model.blockmap import EMPTY, MapEntry
from pitfs.model.ladder import layer_of
from pitfs.model.transfer import Source, TransferKind
from pitfs.storage.files import write_all
from pitfs.store.catalog.minutes import add_seconds
from pitfs.store.catalog.records import Commit, Interval, LayersCommit, Snapshot
from pitfs.store.index.block_maps import block_maps
from pitfs.store.index.map_writer import MapWriter
from pitfs.store.index.merge import by_volume
from pitfs.store.index.reader import JournalIndex, chunk_cache
from pitfs.store.objects.format import (
    HEADER_BYTES,
    ObjectHeader,
    ObjectKind,
    ObjectRecord,
    contents_object,
    object_file,
    pointer,
)
from pitfs.store.objects.publishing import complete, new_object
from pitfs.store.transfer.contents import OwnContents, read_checksums
from pitfs.store.transfer.layers import LayersBuilder
from pitfs.store.transfer.position import interval_of
from pitfs.store.transfer.staging import StagedTransfer
from pitfs.store.transfer.writable_store import WritableStore

COPY_BYTES: Final = 1 << 20


class Committer:
    """Commits staged transfers of one store."""

    def __init__(self, store: WritableStore) -> None:
        self._store = store

    def commit(self, staged: StagedTransfer) -> None:
        """Makes its objects and commits them; when it returns the transfer survives power loss.

        Args:
            staged: finished (`StagedTransfer.finish`).

        Raises:
            PositionMismatchError: the interval of its layers isn't there any more, or isn't what they build on.
            RemoteProtocolError: it is invalid.
            CorruptionError: what is staged, or what it builds on, is damaged.
            CapacityError, OSError: the disk is full, or refuses.
        """
        if staged.manifest.kind is TransferKind.LAYERS:
            self._layers(staged)
        else:
            self._snapshot(staged)

    def _snapshot(self, staged: StagedTransfer) -> None:
        catalog, m = self._store.catalog, staged.manifest
        if m.kind is TransferKind.INTERVAL and m.to_seq == m.from_seq:
            catalog.commit(Commit(m, None))
            return
        last = catalog.last_snapshot()
        fresh = last is None or m.kind is TransferKind.FULL
        before = [EMPTY] * len(self._store.volumes) if fresh or last is None else catalog.roots(last.id)
        roots, record = self._write_map(staged, before)
        objects = [record]
        if staged.diff_blocks.length:
            header = ObjectHeader(
                ObjectKind.SNAPSHOT_BLOCKS, self._store.history, staged.snapshot_id, staged.diff_blocks.length
            )
            objects.append(complete(staged.diff_blocks.fd, header))
        self._store.publish(staged.directory, objects)
        snapshot = Snapshot(staged.snapshot_id, m.to_seq, m.to_time_ns, m.mark)
        interval = None
        if last is not None:
            positions = last.seq, last.time_ns, m.to_seq, m.to_time_ns
            interval = Interval(snapshot.id, last.id, *positions, m.first_time_ns, None, m.cause, 0)
        minutes = dict[int, int]()
        add_seconds(minutes, np.array([m.to_time_ns]))
        catalog.commit(Commit(m, snapshot, roots, interval, objects, minutes))

    def _write_map(
        self, staged: StagedTransfer, before: list[MapEntry]
    ) -> tuple[tuple[MapEntry, ...], ObjectRecord]:
        """Makes the block maps of the snapshot from those before and the rows of the diff."""
        store = self._store
        first = pointer(contents_object(staged.snapshot_id, ObjectKind.SNAPSHOT_BLOCKS), 0)
        own = OwnContents(staged.diff_blocks, store, first)
        with new_object(staged.directory, ObjectKind.MAP, staged.snapshot_id) as fd:
            writer = MapWriter(fd, staged.snapshot_id, store.volumes, before, store.nodes.load)
            for volume, rows in by_volume(staged.diff.verified()):
                pointers, checksums = np.zeros((2, len(rows)), "<u8")
                stored = rows["source"] == Source.FOURTH
                pointers[stored], checksums[stored] = own.of(rows["volume"][stored])
                shared = rows["source"] == Source.SHARED_FOURTH
                if shared.any():
                    pointers[shared] = rows["unit"][shared] + np.uint64(first)
                    checksums[shared] = read_checksums(
                        staged.diff_blocks.fd, rows["unit"][shared], store.volumes[volume].block_size
                    )
                    staged.diff_blocks.take_shared(checksums[shared])
                writer.update(volume, rows["block"].astype("<i8"), pointers, checksums)
            staged.diff_blocks.check_taken()
            return writer.finish(staged.manifest, store.history)

    def _layers(self, staged: StagedTransfer) -> None:
        store, m = self._store, staged.manifest
        base = interval_of(store.catalog, m)
        if m.granularity_ns == m.base_granularity_ns:
            store.catalog.commit_layers(LayersCommit(base, replace(base, cause=m.cause), (), None, {}))
            return
        replaced, before = None, None
        if base.granularity_ns is not None:
            replaced = object_file(ObjectKind.JOURNAL_INDEX, base.end_snapshot_id, base.layer)
            record = store.catalog.object(replaced)
            if record is None:
                raise CorruptionError(store.catalog.path, 0, f"it lists an interval but not {replaced}")
            before = JournalIndex(store.objects, base, record, chunk_cache())
        end_maps = block_maps(store.nodes, store.catalog.roots(base.end_snapshot_id), store.volumes)
        builder = LayersBuilder(staged, store, before, end_maps)
        index, row_count, minutes = builder.build(layer_of(m.granularity_ns))
        objects = (*self._add_contents(staged), index)
        store.publish(staged.directory, (index,))
        interval = replace(base, granularity_ns=m.granularity_ns, cause=m.cause, journal_rows=row_count)
        store.catalog.commit_layers(LayersCommit(base, interval, objects, replaced, minutes))
        if replaced is not None:
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(store.objects.directory, replaced))

    def _add_contents(self, staged: StagedTransfer) -> tuple[ObjectRecord, ...]:
        """Puts the layers' contents behind those that the journal has: what is committed of it stays as it is."""
        base_bytes, length = staged.manifest.base_bytes, staged.journal_blocks.length
        if not length:
            return ()
        header = ObjectHeader(
            ObjectKind.JOURNAL_BLOCKS, self._store.history, staged.snapshot_id, base_bytes + length
        )
        if not base_bytes:
            record = complete(staged.journal_blocks.fd, header)
            self._store.publish(staged.directory, (record,))
            return (record,)
        path = self._store.objects.path_of(header.kind, header.snapshot_id)
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            for at in range(0, length, COPY_BYTES):
                data = staged.journal_blocks.read(min(COPY_BYTES, length - at), at)
                write_all(fd, data, HEADER_BYTES + base_bytes + at)
            return (complete(fd, header),)
        finally:
            os.close(fd)
