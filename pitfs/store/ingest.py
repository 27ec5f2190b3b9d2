"""The writer of one group's store: takes transfers, and makes each visible whole or not at all.

A transfer is staged (checked as it comes, resumable at each checkpoint); at its end it becomes objects:

    made in staging/ → each file synced → renamed to objects/ → both directories synced → the catalog commits

Until the commit nothing of it can be seen. Where this is cut off before the commit, the files in objects/ that
the catalog doesn't know are found when the store is opened the next time, or the next transfer begins. Contents go
back to staging/, so the transfer resumes, and what was built of it is removed. `StagingArea.recover` says which files
these are: nothing else in objects/ is ever removed.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Final

import msgspec

from pitfs.errors import CorruptionError, PositionMismatchError, RemoteProtocolError
from pitfs.model import transfer as wire
from pitfs.model.group import identity_problem
from pitfs.storage.files import fsync_directory, storage_error
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.index.maps import node_loader
from pitfs.store.objects.format import CATALOG, OBJECTS, STAGING, STORE_JSON
from pitfs.store.objects.pool import ObjectPool
from pitfs.store.open_interval.stream import Stream
from pitfs.store.opening import (
    changes_locked,
    check_epoch,
    check_place,
    check_sender,
    make_reserve,
    make_store_json,
    read_store_info,
    take_lock,
)
from pitfs.store.transfer.commit import commit
from pitfs.store.transfer.position import check_follows, interval_of, journal_bytes, no_more_ids
from pitfs.store.transfer.recovery import StagingArea
from pitfs.store.transfer.staging import StagedTransfer
from pitfs.store.transfer.validation import check_manifest
from pitfs.store.transfer.writable_store import WritableStore

log = logging.getLogger(__name__)

MAX_COARSE: Final = 256  # intervals that a welcome names: as many as production keeps journals of


class Ingest:
    """Writes the store ROOT/GROUP; its methods block and are called from one thread at a time.

    Args:
        root: directory of the stores; made if missing, as is the group's.
        hello: whose transfers will come.
        clock: seconds that only go forward: how often streamed writes become readable.

    Raises:
        StoreError: another process writes it, or the directory is something else.
        StoreVersionError: a newer pitfs made it.
        PositionMismatchError: it belongs to another history, or has other volumes.
        RemoteProtocolError: the hello is invalid.
        CapacityError, PitfsError: the disk is full, or refuses. These two also from every method.
    """

    def __init__(self, root: str, hello: wire.Hello, clock: Callable[[], float] = time.monotonic) -> None:
        problem = identity_problem(hello.group, hello.history, hello.volumes)
        if problem:
            raise RemoteProtocolError(f"the sender's hello: {problem}")
        self.path = os.path.join(root, hello.group)
        self.hello = hello
        self._staged: StagedTransfer | None = None
        with ExitStack() as closing, self._errors("opening"):
            self._store, self._area = self._open(root, closing)
            self.stream = Stream(self._store, self._area, hello, clock)
            closing.callback(self.stream.close)
            self.stream.recover()
            self._closing = closing.pop_all()  # what is open: closed last opened first

    def _open(self, root: str, closing: ExitStack) -> tuple[WritableStore, StagingArea]:
        """Opens what there is, makes what there isn't, and settles what was cut off."""
        check_place(self.path)
        os.makedirs(self.path, 0o700, exist_ok=True)
        closing.callback(os.close, take_lock(self.path))
        objects_path, staging = os.path.join(self.path, OBJECTS), os.path.join(self.path, STAGING)
        for directory in (objects_path, staging):
            os.makedirs(directory, 0o700, exist_ok=True)
        check_sender(root, self.hello)
        known = os.path.exists(os.path.join(self.path, STORE_JSON))
        catalog = Catalog(os.path.join(self.path, CATALOG), "write" if known else "make")
        closing.callback(catalog.close)
        if not known:
            make_store_json(self.path, catalog, self.hello)
        fsync_directory(os.path.dirname(self.path) or ".")  # each time: a kill may have come before it
        check_epoch(self.path, catalog, self.hello)
        history = bytes.fromhex(self.hello.history)
        layout = read_store_info(self.path).layout
        if not known:
            log.info("%s: a new store, with room for %d intervals", self.path, layout.max_snapshot_id // 2)
        objects = ObjectPool(objects_path, layout, history, host_of=catalog.host_of)
        closing.callback(objects.close)
        area = StagingArea(staging, objects, catalog)
        with changes_locked(self.path):
            area.recover()
            area.clear_outdated()
        make_reserve(self.path)
        return WritableStore(catalog, objects, node_loader(objects), history, self.hello.volumes), area

    # The life of a transfer

    def welcome(self) -> wire.Welcome:
        """How far the store has come, and which intervals could become finer."""
        catalog, coarse = self._store.catalog, []
        for interval in catalog.coarse_intervals(MAX_COARSE):
            if wire.is_pruned(interval.cause):
                continue
            state = interval.granularity_ns, journal_bytes(catalog, interval), wire.awaits_backfill(interval.cause)
            coarse.append(wire.CoarseInterval(*interval.bounds, *state))
        return msgspec.structs.replace(self._position(), coarse=tuple(coarse))

    def _position(self) -> wire.Welcome:
        """How far the store has come."""
        catalog = self._store.catalog
        with catalog.one_moment():  # a closing may be committed meanwhile
            end, last = self.stream.durable_end, catalog.last_snapshot()
            mark, mark_seq, protected_ns = map(catalog.meta, ("mark", "mark_seq", "protected_through_ns"))
        if last is None:
            return wire.Welcome(mark, 0, 0, protected_ns)
        # Also where what was streamed has a snapshot of its own: it lies behind the mark all the same.
        return wire.Welcome(mark, last.seq, last.time_ns, protected_ns, (), *(end if end[0] > mark_seq else (0, 0)))

    def begin(self, manifest: wire.Manifest) -> wire.ResumePoint:
        """Begins a transfer, or goes on with the staged one where that is the same.

        Raises:
            PositionMismatchError: it doesn't lead on from the store's position.
            RemoteProtocolError: the manifest is invalid.
        """
        catalog = self._store.catalog
        self._store.objects.sweep()
        self._close_staged()
        check_manifest(manifest, self.hello.volumes)
        with self._errors("beginning a transfer"):
            base = None
            if manifest.kind is wire.TransferKind.LAYERS:
                base = interval_of(catalog, manifest)
            else:
                self.stream.wait_for_closing()
                check_follows(self.path, manifest, catalog.meta("mark"), *self.stream.end)
                if catalog.next_snapshot_id() > self._store.layout.max_snapshot_id:
                    raise no_more_ids(self.path, self._store.layout)
            catalog.fence(self.hello.epoch, self.hello.instance)  # not before: an old copy must not shut out the host
            if base is None:
                self.stream.close_here()
            snapshot_id = catalog.next_snapshot_id() if base is None else base.end_snapshot_id
            directory = self._area.path if base is None else self._area.layers_directory(snapshot_id)
            with changes_locked(self.path):
                self._area.recover_transfer(snapshot_id)
            self._staged = self._resume(manifest, snapshot_id, directory)
            if self._staged is None:
                self._area.clear(directory)
                if base is not None:
                    with changes_locked(self.path):
                        self._area.make_room_for_layers(directory)
                self._staged = StagedTransfer.create(directory, manifest, snapshot_id, self._store)
        return self._staged.resume_point

    def _resume(self, manifest: wire.Manifest, snapshot_id: int, directory: str) -> StagedTransfer | None:
        """The staged transfer, if it is this one and whole up to its checkpoint."""
        try:
            return StagedTransfer.resume(directory, manifest, snapshot_id, self._store)
        except (CorruptionError, RemoteProtocolError, FileNotFoundError) as error:
            log.warning("%s: the staged transfer of mark %d begins anew: %s", self.path, manifest.mark, error)
            return None

    def data(self, frame: wire.Data) -> None:
        """Takes the next bytes of a section; bytes that are there already are passed over.

        Raises:
            PositionMismatchError: bytes before these are missing.
            RemoteProtocolError: they are invalid.
        """
        with self._transfer("writing") as staged:
            staged.write(frame)

    def checkpoint(self, cursor: tuple[int, ...]) -> wire.ResumePoint:
        """Makes what has come durable."""
        with self._transfer("making it durable") as staged:
            return staged.checkpoint(tuple(cursor))

    def park(self, cursor: tuple[int, ...]) -> wire.ResumePoint:
        """Puts the transfer off: what came is durable, and it can be begun again when another has been."""
        point = self.checkpoint(cursor)
        self._close_staged()
        return point

    def end(self, end: wire.End) -> wire.Welcome:
        """Commits the transfer; when it returns the transfer survives power loss.

        Raises:
            RemoteProtocolError: it isn't whole, or is invalid; then it has to come again from its beginning.
            PositionMismatchError: the interval of its layers was pruned meanwhile.
            CorruptionError: the map before, or what was staged, is damaged.
        """
        with self._transfer("committing") as staged:
            try:
                staged.finish(end)
                self._commit(staged)
            except (RemoteProtocolError, CorruptionError, PositionMismatchError):
                self._close_staged()
                with changes_locked(self.path):
                    self._area.recover_transfer(staged.snapshot_id)
                self._area.clear(staged.directory)
                raise
        self._close_staged()
        with self._errors("clearing"):
            self._area.clear(staged.directory)
        return self._position()

    def _commit(self, staged: StagedTransfer) -> None:
        """Layers change an interval that is there: no removal may, meanwhile."""
        with changes_locked(self.path) if staged.manifest.kind is wire.TransferKind.LAYERS else nullcontext():
            commit(staged, self._store)

    # The stream

    def write(self, writes: wire.Writes) -> None:
        """Takes the next streamed writes, whole.

        Raises:
            PositionMismatchError: they don't lead on from where the store ends.
            RemoteProtocolError: they are invalid, or a transfer to the next mark is under way.
        """
        if self._staged is not None and self._staged.manifest.kind is not wire.TransferKind.LAYERS:
            raise RemoteProtocolError(f"{self.path}: writes are streamed while a transfer is under way that has them")
        with self._errors("writing"):
            self.stream.write(writes)

    def flush(self, protected_through_ns: int) -> wire.Durable:
        """Makes what was streamed durable, and readable some times a second; every write up to that time is in."""
        with self._errors("making it durable"):
            return self.stream.flush(protected_through_ns)

    def mark(self, mark: wire.StreamMark) -> wire.Durable:
        """Closes the open interval; the snapshot is made while the stream goes on (`Durable.mark` tells when).

        Raises:
            PositionMismatchError: it isn't the next mark, or isn't where the store ends.
        """
        self._store.objects.sweep()
        with self._errors("closing an interval"):
            return self.stream.take_mark(mark)

    def publish(self) -> None:
        """Makes readable what was streamed."""
        with self._errors("making it readable"):
            self.stream.publish()

    def close(self) -> None:
        """Ends the writing; a staged transfer stays, with what came of it. A closing under way is waited for."""
        try:
            if self._staged is not None:
                self._staged.keep()
        finally:
            self._close_staged()
            self._closing.close()

    def _close_staged(self) -> None:
        if self._staged is not None:
            self._staged.close()
            self._staged = None

    @contextmanager
    def _transfer(self, doing: str) -> Iterator[StagedTransfer]:
        """The transfer under way. After any error it resumes at its checkpoint: what came since can't be relied on.

        Raises:
            RemoteProtocolError: none is.
        """
        staged = self._staged
        if staged is None:
            raise RemoteProtocolError(f"{self.path}: no transfer is under way: it has to begin first")
        try:
            with self._errors(doing):
                yield staged
        except BaseException:
            self._close_staged()
            raise

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise storage_error(error, str(error.filename or self.path), doing) from error
