"""A transfer that is complete in staging becomes objects and rows of the catalog.

A snapshot comes with its block map, which is made by streaming over the sorted rows of the diff, and with the contents
of the diff. Layers come with a finer index, and with contents that go behind those that the journal has. The catalog's
commit is the moment from which any of it can be seen.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from typing import Final

import numpy as np

from pitfs.model.blockmap import EMPTY, MapEntry
from pitfs.model.ladder import layer_of
from pitfs.model.transfer import Source, TransferKind
from pitfs.storage.files import open_fd, write_all
from pitfs.store.catalog.records import Commit, Interval, Snapshot, add_seconds
from pitfs.store.index.maps import MapWriter, block_maps
from pitfs.store.index.merge import by_volume
from pitfs.store.index.reader import Journals, chunk_cache
from pitfs.store.objects.format import HEADER_BYTES, ObjectKind, ObjectName, ObjectRecord
from pitfs.store.transfer.contents import OwnContents, read_checksums
from pitfs.store.transfer.layers import LayersBuilder
from pitfs.store.transfer.position import interval_of
from pitfs.store.transfer.staging import StagedTransfer
from pitfs.store.transfer.writable_store import WritableStore, new_object

COPY_BYTES: Final = 1 << 20


def commit(staged: StagedTransfer, store: WritableStore) -> None:
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
        _commit_layers(staged, store)
    else:
        _commit_snapshot(staged, store)


def _commit_snapshot(staged: StagedTransfer, store: WritableStore) -> None:
    catalog, m = store.catalog, staged.manifest
    if m.kind is TransferKind.INTERVAL and m.to_seq == m.from_seq:
        catalog.commit(Commit(m, None))
        return
    last = catalog.last_snapshot()
    fresh = last is None or m.kind is TransferKind.FULL
    before = [EMPTY] * len(store.volumes) if fresh or last is None else catalog.roots(last.id)
    roots, record = _write_map(staged, store, before)
    objects = [record]
    if staged.diff_blocks.length:
        name = ObjectName(ObjectKind.SNAPSHOT_BLOCKS, staged.snapshot_id)
        objects.append(store.complete(staged.diff_blocks.fd, name, staged.diff_blocks.length))
    store.publish(staged.directory, objects)
    snapshot = Snapshot(staged.snapshot_id, m.to_seq, m.to_time_ns, m.mark)
    interval = None
    if last is not None:
        positions = last.seq, last.time_ns, m.to_seq, m.to_time_ns
        interval = Interval(snapshot.id, last.id, *positions, m.first_time_ns, None, m.cause, 0)
    minutes = dict[int, int]()
    add_seconds(minutes, np.array([m.to_time_ns]))
    catalog.commit(Commit(m, snapshot, roots, interval, objects, minutes))


def _write_map(
    staged: StagedTransfer, store: WritableStore, before: list[MapEntry]
) -> tuple[tuple[MapEntry, ...], ObjectRecord]:
    """Makes the block maps of the snapshot from those before and the rows of the diff."""
    layout = store.layout
    first = layout.pointer(ObjectName(ObjectKind.SNAPSHOT_BLOCKS, staged.snapshot_id))
    name = ObjectName(ObjectKind.MAP, staged.snapshot_id)
    own = OwnContents(staged.diff_blocks, store, first)
    with new_object(staged.directory, name) as fd:
        writer = MapWriter(fd, staged.snapshot_id, store.volumes, before, store.load_node, layout)
        for volume, rows in chain.from_iterable(map(by_volume, staged.diff.verified())):
            pointers, checksums = np.zeros((2, len(rows)), "<u8")
            stored = rows["source"] == Source.SNAPSHOT
            pointers[stored], checksums[stored] = own.of(rows["volume"][stored])
            shared = rows["source"] == Source.SHARED_SNAPSHOT
            if shared.any():
                pointers[shared] = rows["unit"][shared] // np.uint64(layout.wire_units) + np.uint64(first)
                checksums[shared] = read_checksums(
                    staged.diff_blocks.fd, rows["unit"][shared], store.volumes[volume].block_size
                )
                staged.diff_blocks.take_shared(checksums[shared])
            writer.update(volume, rows["block"].astype("<i8"), pointers, checksums)
        staged.diff_blocks.check_taken()
        roots, lengths = writer.finish(staged.manifest)
        return roots, store.complete(fd, name, *lengths)


def _commit_layers(staged: StagedTransfer, store: WritableStore) -> None:
    m = staged.manifest
    base = interval_of(store.catalog, m)
    if m.granularity_ns == m.base_granularity_ns:
        store.catalog.commit_layers(replace(base, cause=m.cause), (), "", {})
        return
    replaced, before = "", None
    if base.granularity_ns is not None:
        replaced = ObjectName(ObjectKind.JOURNAL_INDEX, base.end_snapshot_id, base.layer).file
        before = Journals(store.catalog, store.objects, chunk_cache()).of(base)
    end_maps = block_maps(store.load_node, store.catalog.roots(base.end_snapshot_id), store.volumes)
    builder = LayersBuilder(staged, store, before, end_maps)
    index, row_count, minutes = builder.build(layer_of(m.granularity_ns))
    objects = (*_add_contents(staged, store), index)
    store.publish(staged.directory, (index,))
    interval = replace(base, granularity_ns=m.granularity_ns, cause=m.cause, journal_rows=row_count)
    store.catalog.commit_layers(interval, objects, replaced, minutes)
    if replaced:
        name = ObjectName(ObjectKind.JOURNAL_INDEX, base.end_snapshot_id, base.layer)
        store.objects.forget(name)
        with suppress(FileNotFoundError):
            os.unlink(store.objects.path_of(name))


def _add_contents(staged: StagedTransfer, store: WritableStore) -> tuple[ObjectRecord, ...]:
    """Puts the layers' contents behind those that the journal has: what is committed of it stays as it is."""
    name = ObjectName(ObjectKind.JOURNAL_BLOCKS, staged.snapshot_id)
    base_bytes, length = staged.manifest.base_bytes, staged.journal_blocks.length
    if not length:
        return ()
    length_then = base_bytes + length
    if not base_bytes:
        record = store.complete(staged.journal_blocks.fd, name, length_then)
        store.publish(staged.directory, (record,))
        return (record,)
    with open_fd(store.objects.path_of(name), os.O_RDWR) as fd:
        for at in range(0, length, COPY_BYTES):
            data = staged.journal_blocks.read(min(COPY_BYTES, length - at), at)
            write_all(fd, data, HEADER_BYTES + base_bytes + at)
        os.fsync(fd)
        return (ObjectRecord(name.file, name.kind, name.snapshot_id, length_then),)
