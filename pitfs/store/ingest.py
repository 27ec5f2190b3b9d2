"""The writer of one group's store: takes transfers, and makes each visible whole or not at all.

A transfer is staged (checked as it comes, resumable at each checkpoint); at its end it becomes objects:

    made in staging/ → each file synced → renamed to objects/ → both directories synced → the catalog commits

Until the commit nothing of it can be seen. Where this is cut off before the commit, the files in objects/ that
the catalog doesn't know are found when the store is opened the next time, or the next transfer begins:
contents go back to staging/, so the transfer resumes; what was built of it is removed. All this while the
staged transfer says that they are its files: nothing else in objects/ is ever removed.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import msgspec

from pitfs.errors import (
    CapacityError,
    CorruptionError,
    PositionMismatchError,
    RemoteProtocolError,
)
from pitfs.model.group import identity_problem
from pitfs.model.transfer import (
    WAITS,
    Coarse,
    Data,
    Durable,
    End,
    Hello,
    Manifest,
    ResumePoint,
    StreamMark,
    TransferKind,
    Welcome,
    Writes,
)
from pitfs.storage.files import fsync_directory, storage_error
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.index.block_maps import NodeReader
from pitfs.store.objects.format import (
    CATALOG,
    MAX_SNAPSHOT_ID,
    OBJECTS,
    STAGING,
    STORE_JSON,
    ObjectKind,
    object_file,
)
from pitfs.store.objects.pool import ObjectPool
from pitfs.store.open_interval.stream import Stream
from pitfs.store.opening import check_epoch, check_place, check_same_group, make_store_json, take_lock
from pitfs.store.transfer.commit import Committer
from pitfs.store.transfer.layers import interval_of
from pitfs.store.transfer.recovery import StagingArea
from pitfs.store.transfer.staging import StagedTransfer, read_progress
from pitfs.store.transfer.validation import check_manifest

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
        RemoteProtocolError: the hello can't be.
        CapacityError, PitfsError: the disk is full, or refuses. These two also from every method.
    """

    def __init__(self, root: str, hello: Hello, clock: Callable[[], float] = time.monotonic) -> None:
        problem = identity_problem(hello.group, hello.history, hello.volumes)
        if problem:
            raise RemoteProtocolError(f"the sender's hello: {problem}")
        self.path = os.path.join(root, hello.group)
        self.hello = hello
        self._history = bytes.fromhex(hello.history)
        self._staging = os.path.join(self.path, STAGING)
        self._objects_path = os.path.join(self.path, OBJECTS)
        self._staged: StagedTransfer | None = None
        self._lock_fd = -1
        self._catalog: Catalog | None = None
        self._objects = ObjectPool(self._objects_path, self._history)
        self._nodes = NodeReader(self._objects)
        self._area: StagingArea
        self._committer: Committer
        self._clock = clock
        self._stream: Stream | None = None
        try:
            with self._errors("opening"):
                self._open()
        except BaseException:
            self.close()
            raise

    # Opening

    def _open(self) -> None:
        check_place(self.path)
        os.makedirs(self.path, 0o700, exist_ok=True)
        self._lock_fd = take_lock(self.path)
        for directory in (self._objects_path, self._staging):
            os.makedirs(directory, 0o700, exist_ok=True)
        check_same_group(self.path, self.hello)
        known = os.path.exists(os.path.join(self.path, STORE_JSON))
        self._catalog = catalog = Catalog(os.path.join(self.path, CATALOG), "write" if known else "make")
        if not known:
            make_store_json(self.path, catalog, self.hello)
        fsync_directory(os.path.dirname(self.path) or ".")  # each time: a kill may have come before it
        check_epoch(self.path, catalog, self.hello)
        self._area = StagingArea(self._staging, self._objects_path, catalog)
        self._committer = Committer(catalog, self._objects, self._nodes, self._history, self.hello.volumes)
        self._area.settle(os.listdir(self._objects_path))
        self._area.clear_outdated()
        stream = Stream(
            catalog, self._objects, self._nodes, self._area, self._history, self.hello, self._clock
        )
        self._stream = stream
        stream.recover()

    # The life of a transfer

    def welcome(self) -> Welcome:
        """Where the store stands, and what could become finer."""
        catalog, coarse = self._opened(), []
        for interval in catalog.coarse_intervals(MAX_COARSE):
            blocks = catalog.object(object_file(ObjectKind.JOURNAL_BLOCKS, interval.end_snapshot_id))
            journal_bytes = blocks.data_bytes if blocks else 0
            positions = interval.from_seq, interval.from_time_ns, interval.to_seq, interval.to_time_ns
            coarse.append(Coarse(*positions, interval.granularity_ns, journal_bytes, interval.cause.endswith(WAITS)))
        return msgspec.structs.replace(self._standing(), coarse=tuple(coarse))

    def _standing(self) -> Welcome:
        catalog = self._opened()
        with catalog.one_moment():  # a closing may be committed meanwhile
            tail, last = self._streaming().durable_end, catalog.last_snapshot()
            mark, mark_seq, protected_ns = map(catalog.meta, ("mark", "mark_seq", "protected_through_ns"))
        if last is None:
            return Welcome(mark, 0, 0, protected_ns)
        # Also where what was streamed has a snapshot of its own: it lies behind the mark all the same.
        tail_seq, tail_time_ns = tail if tail[0] > mark_seq else (0, 0)
        return Welcome(mark, last.seq, last.time_ns, protected_ns, (), tail_seq, tail_time_ns)

    def begin(self, manifest: Manifest) -> ResumePoint:
        """Begins a transfer, or goes on with the staged one where that is the same.

        Raises:
            PositionMismatchError: it doesn't lead on from where the store stands.
            RemoteProtocolError: the manifest can't be.
        """
        catalog, stream = self._opened(), self._streaming()
        self._close_staged()
        check_manifest(manifest, self.hello.volumes)
        layers = manifest.kind is TransferKind.LAYERS
        with self._errors("beginning a transfer"):
            if not layers:
                stream.wait_for_closing()
                self._check_position(manifest, catalog.meta("mark"), *stream.end)
            base = interval_of(catalog, manifest) if layers else None
            catalog.fence(self.hello.epoch, self.hello.instance)  # not before: an old copy must not shut out the host
            if not layers:
                stream.close_here()
            snapshot = catalog.next_snapshot_id() if base is None else base.end_snapshot_id
            if snapshot > MAX_SNAPSHOT_ID:
                raise CapacityError(f"{self.path}: no more than {MAX_SNAPSHOT_ID} snapshots fit in a store")
            directory = self._staging if base is None else self._area.layers_directory(snapshot)
            self._area.settle_transfer(snapshot)
            self._staged = self._resume(manifest, snapshot, directory)
            if self._staged is None:
                self._area.clear(directory)
                if base is not None:
                    self._area.make_room_for_layers(directory)
                self._staged = StagedTransfer.create(directory, manifest, snapshot, self._history, self.hello.volumes)
        return self._staged.resume_point

    def data(self, frame: Data) -> None:
        """Takes the next bytes of a section; bytes that are there already are passed over.

        Raises:
            PositionMismatchError: bytes before these are missing.
            RemoteProtocolError: they can't be.
        """
        staged = self._under_way()
        with self._ends_on_error(), self._errors("writing"):
            staged.write(frame)

    def checkpoint(self, cursor: tuple[int, ...]) -> ResumePoint:
        """Makes what has come durable."""
        staged = self._under_way()
        with self._ends_on_error(), self._errors("making it durable"):
            return staged.checkpoint(tuple(cursor))

    def park(self, cursor: tuple[int, ...]) -> ResumePoint:
        """Puts the transfer off: what came is durable, and it can be begun again when another has been."""
        point = self.checkpoint(cursor)
        self._close_staged()
        return point

    def end(self, end: End) -> Welcome:
        """Commits the transfer; when it returns the transfer survives power loss.

        Raises:
            RemoteProtocolError: it isn't whole, or can't be; then it has to come again from its beginning.
            CorruptionError: the map before, or what was staged, is damaged.
        """
        staged = self._under_way()
        with self._ends_on_error(), self._errors("committing"):
            try:
                staged.finish(end)
                self._committer.commit(staged)
            except (RemoteProtocolError, CorruptionError):
                self._close_staged()
                self._area.settle_transfer(staged.snapshot)
                self._area.clear(staged.directory)
                raise
        self._close_staged()
        with self._errors("clearing"):
            self._area.clear(staged.directory)
        return self._standing()

    # The stream

    def write(self, writes: Writes) -> None:
        """Takes the next streamed writes, whole.

        Raises:
            PositionMismatchError: they don't lead on from where the store ends.
            RemoteProtocolError: they can't be, or a transfer to the next mark is under way.
        """
        stream = self._streaming()
        if self._staged is not None and self._staged.manifest.kind is not TransferKind.LAYERS:
            raise RemoteProtocolError(f"{self.path}: writes are streamed while a transfer is under way that has them")
        with self._errors("writing"):
            stream.write(writes)

    def flush(self, protected_through_ns: int) -> Durable:
        """Makes what was streamed durable, and readable some times a second; every write up to that time is in."""
        with self._errors("making it durable"):
            return self._streaming().flush(protected_through_ns)

    def mark(self, mark: StreamMark) -> Durable:
        """Closes the open interval; the snapshot is made while the stream goes on (`Durable.mark` tells when).

        Raises:
            PositionMismatchError: it isn't the next mark, or isn't where the store ends.
        """
        with self._errors("closing an interval"):
            return self._streaming().take_mark(mark)

    def publish(self) -> None:
        """Makes readable what was streamed."""
        with self._errors("making it readable"):
            self._streaming().publish()

    def close(self) -> None:
        """Ends the writing; a staged transfer stays, with what came of it. A closing under way is waited for."""
        try:
            if self._staged is not None:
                self._staged.keep()
        finally:
            self._close()

    def _close(self) -> None:
        self._close_staged()
        stream, self._stream = self._stream, None
        try:
            if stream is not None:
                stream.close()
        finally:
            self._objects.close()
            if self._catalog is not None:
                self._catalog.close()
                self._catalog = None
            if self._lock_fd >= 0:
                os.close(self._lock_fd)
                self._lock_fd = -1

    def _check_position(self, manifest: Manifest, mark: int, seq: int, time_ns: int) -> None:
        """Whether it leads on from that mark, and from the position of what came last."""
        hint = "begin the session anew, so that production learns where the store stands"
        # Before a copy one may have been given up, whose marks are skipped.
        skips = manifest.kind in (TransferKind.FULL, TransferKind.CHANGES) and manifest.mark > mark
        if manifest.mark != mark + 1 and not skips:
            raise PositionMismatchError(
                f"{self.path}: production sends mark {manifest.mark}, the store has {mark} and takes "
                f"{mark + 1}: {hint}"
            )
        if mark == 0 and manifest.kind is not TransferKind.FULL:
            raise PositionMismatchError(
                f"{self.path}: the store is empty and takes a full copy first: {hint}"
            )
        if manifest.kind is TransferKind.FULL:
            if mark and (manifest.to_seq <= seq or manifest.to_time_ns <= time_ns):
                raise PositionMismatchError(
                    f"{self.path}: a full copy at seq {manifest.to_seq}, the store is at "
                    f"{seq} already: {hint}"
                )
        elif (manifest.from_seq, manifest.from_time_ns) != (seq, time_ns):
            raise PositionMismatchError(
                f"{self.path}: production sends what follows seq {manifest.from_seq} at "
                f"{manifest.from_time_ns} ns, the store is at seq {seq} at {time_ns} ns: {hint}; if "
                f"this lasts the store was restored from an older or another copy, and a new one is needed"
            )

    def _resume(self, manifest: Manifest, snapshot: int, directory: str) -> StagedTransfer | None:
        """The staged transfer, if it is this one and whole up to its checkpoint."""
        progress = read_progress(directory)
        if progress is None or progress.snapshot != snapshot:
            return None
        # Why it is no more than this may have changed since.
        progress = msgspec.structs.replace(
            progress, manifest=msgspec.structs.replace(progress.manifest, cause=manifest.cause)
        )
        if progress.manifest != manifest:
            return None
        try:
            return StagedTransfer(directory, progress, self._history, self.hello.volumes)
        except (CorruptionError, RemoteProtocolError, FileNotFoundError) as error:
            log.warning("%s: the staged transfer of mark %d begins anew: %s", self.path, manifest.mark, error)
            return None

    def _close_staged(self) -> None:
        if self._staged is not None:
            self._staged.close()
            self._staged = None

    def _under_way(self) -> StagedTransfer:
        if self._staged is None:
            raise RemoteProtocolError(f"{self.path}: no transfer is under way: it has to begin first")
        return self._staged

    def _streaming(self) -> Stream:
        if self._stream is None:
            raise RuntimeError("this Ingest is closed")
        return self._stream

    def _opened(self) -> Catalog:
        if self._catalog is None:
            raise RuntimeError("this Ingest is closed")
        return self._catalog

    @contextmanager
    def _ends_on_error(self) -> Iterator[None]:
        """After any error the transfer resumes at its checkpoint: what came since can't be relied on."""
        try:
            yield
        except BaseException:
            self._close_staged()
            raise

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise storage_error(error, str(error.filename or self.path), doing) from error
