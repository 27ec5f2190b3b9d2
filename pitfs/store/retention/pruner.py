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
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Final

import numpy as np

from pitfs.errors import CorruptionError, DiskFullError, PermissionDeniedError, StoreError
from pitfs.model.retention import Action, Remove, Thin
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
from pitfs.store.pins.pins import pins_locked
from pitfs.store.retention.removal import Removal
from pitfs.store.retention.thinning import Thinning, settle
from pitfs.store.transfer.writable_store import WritableStore

log = logging.getLogger(__name__)

BATCH_ACTIONS: Final = 512  # a commit of so many takes some 0.1 s
BATCH_WEIGHT: Final = 1 << 20  # rows and units of the journals of a batch: some 4 MiB
SCARCE_BYTES: Final = 64 << 20  # with less room than that batches are small: each gives room for the next
SCARCE_ACTIONS: Final = 16
LOCKED_S: Final = 0.25  # then what is left of a batch waits for the next time that the locks are free
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


class Pruner(AbstractContextManager["Pruner"]):
    """Opens a store for changes, beside a receiver that may be running; one at a time.

    On a full disk it gives up the store's reserve, so that the catalog can be read at all: plan with it open.

    Args:
        path: of the store.
        changes: whether it is to change anything; else it only foretells, of any store that can be read.

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
            self._catalog = Catalog(os.path.join(path, CATALOG), "write" if changes else "read")
            closing.callback(self._catalog.close)
            history = bytes.fromhex(info.history)
            objects = ObjectPool(
                os.path.join(path, OBJECTS), info.layout, history, host_of=self._catalog.host_of
            )  # fmt: skip
            closing.callback(objects.close)
            self._store = WritableStore(self._catalog, objects, node_loader(objects), history, info.volumes)
            self._freed: list[int] = []  # intervals whose row in `removals` may go once all is synced
            if changes:
                self._finish_removals()
            self._closing = closing.pop_all()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the store back."""
        self._closing.close()

    def foretell(self, action: Action) -> int:
        """Bytes on the disk that it frees; changes nothing.

        Raises:
            CorruptionError: what it would have to read is damaged.
        """
        if isinstance(action, Remove):
            return self._removal(action).foretell() if self._bounds(action) else 0
        thinning = self._thinning(action)
        return thinning.foretell() if thinning else 0

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
        waiting: list[Thin] = []
        with self._errors():
            for batch in self._batches(actions):
                waiting += self._execute(batch)
                del waiting[MAX_POSTPONED:]
                progress(self.progress)
            if waiting and (waiting := [left for batch in self._batches(waiting) for left in self._execute(batch)]):
                raise DiskFullError(f"{self.path}: no room for the journals that would be smaller: make some room")
            self._forget_freed()
            self._vacuum()
        progress(self.progress)
        return self.progress

    # Batches

    def _batches(self, actions: Iterable[Action]) -> Iterator[list[Thinning] | list[Remove]]:
        """Neighbouring actions of one kind, prepared."""
        thin: dict[int, Thinning] = {}
        remove: list[Remove] = []
        weight = 0
        for action in chain(actions, (None,)):
            limit = BATCH_ACTIONS if free_bytes(self.path) > SCARCE_BYTES else SCARCE_ACTIONS
            if thin and (
                not isinstance(action, Thin) or action.end_snapshot_id in thin
                or len(thin) >= limit or weight > BATCH_WEIGHT
            ):  # fmt: skip
                yield list(thin.values())
                thin, weight = {}, 0
            if remove and (not isinstance(action, Remove) or len(remove) >= limit):
                yield remove
                remove = []
            if isinstance(action, Remove):
                remove.append(action)
            elif action is not None:
                thinning = self._thinning(action)
                if thinning is None:
                    self._count(skipped=1)
                    continue
                thin[action.end_snapshot_id] = thinning
                weight += thinning.weight

    def _execute(self, batch: Sequence[Thinning] | Sequence[Remove]) -> list[Thin]:
        """The actions that have to wait for room."""
        thinnings = [each for each in batch if isinstance(each, Thinning)]
        if thinnings:
            return self._thin(thinnings)
        self._forget_freed()  # they may have rows of the same intervals
        removes = [each for each in batch if isinstance(each, Remove)]
        prepared = [(each, self._removal(each)) for each in removes if self._bounds(each) is not None]
        self._count(skipped=len(removes) - len(prepared))
        for _, removal in prepared:
            removal.prepare()
        while prepared:
            self._remove(prepared)
        return []

    # Thinning

    def _thinning(self, action: Thin) -> Thinning | None:
        interval = self._catalog.interval_to(action.end_snapshot_id)
        thinning = Thinning(self._store, interval, action) if interval is not None else None
        return thinning if thinning is not None and thinning.is_due else None

    def _thin(self, thinnings: Sequence[Thinning]) -> list[Thin]:
        ids = [each.before.end_snapshot_id for each in thinnings]
        with self._catalog.changes():
            for snapshot_id in ids:
                self._catalog.put("removals", (snapshot_id, snapshot_id), "ON CONFLICT DO NOTHING")
        built, postponed = self._build(thinnings)
        sync_file_system(self._store.objects.directory)
        done, refused = list[Thinning](), list[Thinning]()
        with changes_locked(self.path), pins_locked(self.path) as pins:
            pinned = _Pinned(pins)
            with self._catalog.changes():
                self._delete_rows(self._freed)
                for each in built:
                    if pinned.between(each.before.from_seq, each.before.to_seq) or not each.is_still():
                        refused.append(each)
                    else:
                        each.change()
                        done.append(each)
            for each in refused:
                each.drop()
        self._freed = ids
        self._count(len(done), len(thinnings) - len(done) - len(postponed), sum(each.free() for each in done))
        return postponed

    def _build(self, thinnings: Sequence[Thinning]) -> tuple[list[Thinning], list[Thin]]:
        """Those whose new indexes are made, and those for which there was no room."""
        built, postponed = list[Thinning](), list[Thin]()
        for each in thinnings:
            try:
                each.build()
                built.append(each)
            except CorruptionError as error:  # no reason to keep all the others
                log.warning("the interval up to seq %d stays as it is: %s", each.before.to_seq, error)
            except OSError as error:
                if error.errno not in FULL_ERRNOS:
                    raise
                postponed.append(each.action)
        return built, postponed

    # Removal

    def _removal(self, action: Remove) -> Removal:
        return Removal(self._store, action.after_id, action.before_id, action.cause)

    def _bounds(self, action: Remove) -> tuple[int, int] | None:
        """The seqs between which instants go; None where there is nothing to remove."""
        catalog = self._catalog
        before = catalog.snapshot(action.before_id)
        after = catalog.snapshot(action.after_id) if action.after_id is not None else None
        interval = catalog.interval_to(action.before_id)
        if before is None or interval is None or (after is None) != (action.after_id is None):
            return None
        if action.after_id is not None and interval.base_snapshot_id <= action.after_id:
            return None
        return after.seq if after is not None else -1, before.seq

    def _remove(self, removals: list[tuple[Remove, Removal]]) -> None:
        """As many of them as there is time for while others wait for the locks; takes them from the list."""
        done, refused, begun_s = list[Removal](), 0, time.monotonic()
        with changes_locked(self.path), pins_locked(self.path) as pins:
            pinned = _Pinned(pins)
            with self._catalog.changes():
                while removals and (not done or time.monotonic() - begun_s < LOCKED_S):
                    action, removal = removals.pop(0)
                    bounds = self._bounds(action)
                    if bounds is None or pinned.between(*bounds):
                        refused += 1
                        continue
                    removal.change()
                    done.append(removal)
        self._count(len(done), refused, sum(removal.free() for removal in done))

    # What a crash left, and what is left to do afterwards

    def _finish_removals(self) -> None:
        for before_id, after_id in self._catalog.removals():
            if before_id == after_id:
                with changes_locked(self.path):
                    settle(self._store, before_id)
                self._freed.append(before_id)
        for removal in Removal.unfinished(self._store):
            removal.free()
        self._forget_freed()

    def _forget_freed(self) -> None:
        """Their room is given back: durable first, else a power loss would bring files back that nobody looks for."""
        if self._freed:
            sync_file_system(self._store.objects.directory)
            with self._catalog.changes(durable=False):
                self._delete_rows(self._freed)
            self._freed = []

    def _delete_rows(self, before_ids: Sequence[int]) -> None:
        for before_id in before_ids:
            self._catalog.delete("removals", "before_id", before_id)

    def _vacuum(self) -> None:
        """Gives the disk some of the catalog's free pages, where they are many and it can."""
        for _ in range(VACUUM_STEPS):
            mode, free, pages = (
                self._catalog.rows(f"PRAGMA {name}")[0][0] for name in ("auto_vacuum", "freelist_count", "page_count")
            )
            if mode != 2 or free < max(VACUUM_PAGES, pages // 8):  # 2: incremental
                return
            self._catalog.rows(f"PRAGMA incremental_vacuum({VACUUM_PAGES})")

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
        self._stretches = [
            (each.unlisted.least.seq, each.unlisted.greatest.seq) for each in pins if each.unlisted is not None
        ]  # fmt: skip

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
