"""The execution of retention: its actions, in batches, beside a receiver and readers.

What takes time, the reading of journals and the making of new ones, comes before the locks, and giving room back comes
after them. Under the locks a batch only looks whether each action is still allowed, and commits:

    prepare → sync → changes locked, pins locked: look at the pins, at what the actions were prepared for, commit → free

So a layer, or a reader who pins, comes before the commit and the action is skipped, or after it and finds the history
as it is then. What a crash leaves unfreed stands in the table `removals`, and whoever opens a Pruner next frees it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np

from pitfs.errors import CorruptionError, DiskFullError, PermissionDeniedError, StoreError
from pitfs.storage.files import FULL_ERRNOS, storage_error, sync_file_system
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.index.maps import node_loader
from pitfs.store.objects.format import CATALOG, LOCK, OBJECTS, PRUNE_LOCK
from pitfs.store.objects.pool import ObjectPool
from pitfs.store.opening import (
    changes_locked,
    free_bytes,
    give_up_reserve,
    knows_changes_lock,
    make_reserve,
    read_store_info,
)
from pitfs.store.pins.pin_file import PinnedInstants
from pitfs.store.pins.pins import list_pins, pins_locked
from pitfs.store.retention.levels import Action, Thin
from pitfs.store.retention.removal import Removal
from pitfs.store.retention.thinning import Thinning, settle
from pitfs.store.transfer.writable_store import WritableStore

log = logging.getLogger(__name__)

THIN_WEIGHT: Final = 256  # besides the rows and units of its journal: 4,096 at most share their syncs
REMOVE_WEIGHT: Final = 16_384
BATCH_WEIGHT: Final = 1 << 20  # some 4 MiB
SCARCE_BYTES: Final = 64 << 20  # with less room than that batches are small: each gives room for the next
SCARCE_WEIGHT: Final = 16 * THIN_WEIGHT
FREEING: Final = 8  # threads
LOCKED_S: Final = 0.25  # as long others wait for the locks; then they have their turn
MAX_POSTPONED: Final = 4096
VACUUM_PAGES: Final = 256  # at a time
VACUUM_STEPS: Final = 64


@dataclass(frozen=True, slots=True)
class Progress:
    """How far `Pruner.apply` has come.

    Attributes:
        done: actions that were executed.
        skipped: those that a pin forbade, or for which there was nothing to do any more.
        freed_bytes: on the disk.
    """

    done: int = 0
    skipped: int = 0
    freed_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Step:
    """An action, what does it, and the seqs strictly between which instants go."""

    action: Action
    change: Thinning | Removal
    bounds: tuple[int, int]


class Pruner(AbstractContextManager["Pruner"]):
    """Opens a store for changes, beside a receiver that may be running; one at a time.

    On a full disk it gives up the store's reserve, so that the catalog can be read at all: plan with it open.

    Args:
        path: of the store.
        changes: whether it is to change anything; else it only foretells, of any store that can be read.

    Attributes:
        catalog: of the store; the planner reads it, too.

    Raises:
        StoreError: it isn't a store, another pruner is at work, it is on a read-only file system, or an older pitfs
            writes it.
        PitfsError: the disk refuses.
    """

    def __init__(self, path: str, changes: bool = True) -> None:
        self.path, info = path, read_store_info(path)
        self.progress = Progress()
        with ExitStack() as closing, self._errors():
            if changes:
                _check_writable(path)
                closing.callback(make_reserve, path)
                give_up_reserve(path)
                closing.callback(os.close, _take_lock(path))
            self.catalog = Catalog(os.path.join(path, CATALOG), "write" if changes else "read")
            closing.callback(self.catalog.close)
            history = bytes.fromhex(info.history)
            objects = ObjectPool(os.path.join(path, OBJECTS), info.layout, history, host_of=self.catalog.host_of)
            closing.callback(objects.close)
            self._store = WritableStore(self.catalog, objects, node_loader(objects), history, info.volumes)
            self._thinned = set[int]()  # ends of intervals whose row in `removals` may go once all is synced
            if changes:
                self._finish_removals()
            self._closing = closing.pop_all()

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def foretell(self, action: Action) -> int:
        """Bytes on the disk that it frees; changes nothing. What is damaged frees nothing, and stays as it is."""
        size = 0
        with self._errors(), self._damage_passed_over():
            step = self._step(action)
            size += step.change.foretell() if step is not None else 0
        return size

    def apply(self, actions: Iterable[Action], progress: Callable[[Progress], None] = lambda _: None) -> Progress:
        """Executes actions, in their order but for some that need room on a full disk.

        Args:
            actions: are taken as they are needed, batch by batch.
            progress: is told how far it has come, after each batch.

        Raises:
            DiskFullError: there was no room even for what frees some.
            PitfsError: the disk refuses. What was done until then stays so.
        """
        self.progress = Progress()
        with self._errors():
            waiting = self._run(actions, progress)
            if waiting and self._run(waiting, progress):
                raise DiskFullError(f"{self.path}: no room for the journals that would be smaller: make some room")
            self._forget_thinned()
            self._vacuum()
        return self.progress

    # Batches

    def _run(self, actions: Iterable[Action], progress: Callable[[Progress], None]) -> list[Action]:
        """Executes them; returns those that wait for room."""
        waiting: list[Action] = []
        for batch in self._batches(actions):
            waiting += self._execute(batch)
            progress(self.progress)
        return waiting[:MAX_POSTPONED]

    def _step(self, action: Action) -> _Step | None:
        """None where there is nothing to do (any more)."""
        catalog, store = self.catalog, self._store
        if isinstance(action, Thin):
            interval = catalog.interval_to(action.end_snapshot_id)
            if interval is None or not (thinning := Thinning(store, interval, action)).is_due:
                return None
            return _Step(action, thinning, (interval.from_seq, interval.to_seq))
        after_id, before = action.after_id or 0, catalog.snapshot(action.before_id)
        after, interval = catalog.snapshot(after_id), catalog.interval_to(action.before_id)
        if before is None or interval is None or (after_id and after is None) or interval.base_snapshot_id <= after_id:
            return None
        removal = Removal(store, action.after_id, action.before_id, action.cause)
        return _Step(action, removal, (after.seq if after is not None else -1, before.seq))

    def _batches(self, actions: Iterable[Action]) -> Iterator[list[_Step]]:
        """Actions that don't build on each other."""
        batch, ends, weight = list[_Step](), set[tuple[str, int]](), 0
        for action in actions:
            own = {("end", action.end_snapshot_id if isinstance(action, Thin) else action.before_id)}
            if not isinstance(action, Thin):
                own.add(("start", action.after_id or 0))
            limit = BATCH_WEIGHT if free_bytes(self.path) > SCARCE_BYTES else SCARCE_WEIGHT
            if batch and (weight >= limit or ends & own):
                yield batch
                batch, ends, weight = [], set(), 0
            step = self._step(action)
            if step is None:
                self._count(skipped=1)
                continue
            batch.append(step)
            ends |= own
            weight += THIN_WEIGHT + step.change.weight if isinstance(step.change, Thinning) else REMOVE_WEIGHT
        if batch:
            yield batch

    def _execute(self, batch: Sequence[_Step]) -> list[Action]:
        """The actions that have to wait for room."""
        ids = {each.action.end_snapshot_id for each in batch if isinstance(each.action, Thin)}
        with self.catalog.changes():
            for snapshot_id in ids:
                self.catalog.put("removals", (snapshot_id, snapshot_id), "ON CONFLICT DO NOTHING")
        prepared, waiting = self._prepare(batch)
        if ids or self._thinned:
            sync_file_system(self._store.objects.directory)
            self._delete_rows(self._thinned - ids)
        done = list[_Step]()
        while prepared:
            done += self._commit(prepared)
        self._thinned = ids
        changes = [each.change for each in done]
        with ThreadPoolExecutor(FREEING) as threads:  # a disk that isn't waited for is idle
            freed = sum(threads.map(Thinning.free, (each for each in changes if isinstance(each, Thinning))))
        freed += sum(each.free() for each in changes if isinstance(each, Removal))
        self._count(len(done), len(batch) - len(done) - len(waiting), freed)
        return waiting

    def _prepare(self, batch: Sequence[_Step]) -> tuple[list[_Step], list[Action]]:
        """Those that can be committed, last one first, and the actions for which there was no room."""
        prepared, waiting, pinned = list[_Step](), list[Action](), _Pinned(list_pins(self.path))
        for each in batch:
            if pinned.between(*each.bounds):  # as `_commit` would find
                continue
            try:
                with self._damage_passed_over():
                    each.change.prepare()
                    prepared.append(each)
            except OSError as error:
                if error.errno not in FULL_ERRNOS:
                    raise
                waiting.append(each.action)
        return prepared[::-1], waiting

    def _commit(self, prepared: list[_Step]) -> list[_Step]:
        """Commits as many of them as there is time for while others wait for the locks; takes them from the list."""
        done = list[_Step]()
        with changes_locked(self.path), pins_locked(self.path) as pins:
            pinned = _Pinned(pins)
            with self.catalog.changes():
                begun_s = time.monotonic()  # not before: who has waited for the locks that long would do nothing
                while prepared and time.monotonic() - begun_s < LOCKED_S:
                    step = prepared.pop()
                    if self._is_still(step) and not pinned.between(*step.bounds):
                        step.change.change()
                        done.append(step)
                    else:
                        step.change.drop()
        return done

    def _is_still(self, step: _Step) -> bool:
        """Whether the history is what the step was prepared for."""
        if isinstance(step.change, Thinning):
            return step.change.is_still()
        now = self._step(step.action)
        return now is not None and now.bounds == step.bounds

    # What a crash left, and what is left to do afterwards

    def _finish_removals(self) -> None:
        for before_id, after_id in self.catalog.removals():
            if before_id == after_id:
                with changes_locked(self.path), self._damage_passed_over():
                    settle(self._store, before_id)
            if before_id == after_id or self.catalog.snapshot(before_id) is None:  # as a rebuilt catalog may have it
                self._thinned.add(before_id)
        self._forget_thinned()
        for removal in Removal.unfinished(self._store):
            with self._damage_passed_over():
                removal.free()

    @contextmanager
    def _damage_passed_over(self) -> Iterator[None]:
        """What is damaged keeps nobody from pruning what is around it."""
        try:
            yield
        except CorruptionError as error:
            log.warning("not pruned, or not all of it: %s", error)

    def _forget_thinned(self) -> None:
        """Room that was given back: durable first, else a power loss would bring files back that nobody looks for."""
        if self._thinned:
            sync_file_system(self._store.objects.directory)
            self._delete_rows(self._thinned)
            self._thinned = set()

    def _delete_rows(self, thinned: Iterable[int]) -> None:
        with self.catalog.changes():
            for before_id in thinned:
                self.catalog.delete("removals", "before_id", before_id)

    def _vacuum(self) -> None:
        """Gives the disk some of the catalog's free pages, where they are many and it can."""
        for _ in range(VACUUM_STEPS):
            mode, free, pages = (
                self.catalog.rows(f"PRAGMA {name}")[0][0] for name in ("auto_vacuum", "freelist_count", "page_count")
            )
            if mode != 2 or free < max(VACUUM_PAGES, pages // 8):  # 2: incremental
                return
            self.catalog.rows(f"PRAGMA incremental_vacuum({VACUUM_PAGES})")

    def _count(self, done: int = 0, skipped: int = 0, freed_bytes: int = 0) -> None:
        now = self.progress
        self.progress = Progress(now.done + done, now.skipped + skipped, now.freed_bytes + freed_bytes)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise storage_error(error, str(error.filename or self.path), "pruning") from error


class _Pinned:
    """What living processes have pinned, by seq."""

    def __init__(self, pins: Sequence[PinnedInstants]) -> None:
        self._seqs = np.array(sorted(position.seq for each in pins for position in each.instants), "<i8")
        self._stretches = [(held.least.seq, held.greatest.seq) for each in pins if (held := each.unlisted)]

    def between(self, after_seq: int, before_seq: int) -> bool:
        """Whether an instant strictly between the two is pinned."""
        if self._seqs.searchsorted(before_seq) > self._seqs.searchsorted(after_seq, "right"):
            return True
        return any(least < before_seq and greatest > after_seq for least, greatest in self._stretches)


def _check_writable(path: str) -> None:
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        raise StoreError(f"{path}: on a read-only file system: nothing can be pruned there: mount it read-write")
    if not os.access(path, os.W_OK):
        raise PermissionDeniedError(path)
    if not knows_changes_lock(path):
        raise StoreError(
            f"{path}: an older pitfs, which doesn't know of pruning, is writing this store (it holds "
            f"{os.path.join(path, LOCK)}): restart `pitfs receive` with this version first"
        )


def _take_lock(path: str) -> int:
    """The descriptor that holds the pruner's lock."""
    fd = os.open(os.path.join(path, PRUNE_LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise StoreError(f"{path}: another process is pruning this store: wait until it has ended") from None
    return fd
