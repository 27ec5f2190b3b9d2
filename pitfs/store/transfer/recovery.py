"""staging/: transfers and closings under way, or put off; and the recovery of those whose commit didn't come about."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from itertools import chain
from typing import Final

from pitfs.errors import PositionMismatchError, StoreError
from pitfs.model.ladder import LAST_LAYER, layer_of
from pitfs.storage.files import fsync_directory
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.catalog.database import REMEDY
from pitfs.store.objects.format import CATALOG, HEADER_BYTES, ObjectKind, ObjectName
from pitfs.store.objects.pool import ObjectPool
from pitfs.store.transfer.position import interval_of
from pitfs.store.transfer.staging import read_progress

log = logging.getLogger(__name__)

MAX_PARKED: Final = 8  # transfers of layers that are put off: each may take as much disk as its interval's journal
LAYERS_PREFIX: Final = "layers-"
CLOSING_PREFIX: Final = "closing-"
_STAGED: Final = re.compile(f"(?:{LAYERS_PREFIX}|{CLOSING_PREFIX})(?P<snapshot_id>[0-9a-f]{{16}})")
RECENT_IDS: Final = 64  # of objects that are looked at when the store is opened


def _names_of(snapshot_id: int) -> list[ObjectName]:
    """All objects of that id that there may be."""
    indexes = [ObjectName(ObjectKind.JOURNAL_INDEX, snapshot_id, layer) for layer in range(LAST_LAYER)]
    return [*(ObjectName(kind, snapshot_id) for kind in ObjectKind), *indexes]


class StagingArea:
    """staging/ of a store: the transfer that leads to the next mark in itself, layers in a directory of their own.

    Args:
        path: of staging/.
    """

    def __init__(self, path: str, objects: ObjectPool, catalog: Catalog) -> None:
        self.path, self._objects, self._catalog = path, objects, catalog

    def recover(self) -> None:
        """Deals with files in objects/ that the catalog doesn't know: their commit didn't come about.

        They are found by what was under way, not by a look at all objects: a commit adds the next ids, closes an open
        interval, or adds layers that are in staging. RECENT_IDS are looked at besides, since after a power loss a file
        may be there again that was removed. The newest folder tells whether the catalog has what was made last.

        Raises:
            StoreError: there are others; then nothing was touched.
        """
        next_id, open_intervals = self._catalog.next_snapshot_id(), self._catalog.open_intervals()
        ids = set(range(max(1, next_id - RECENT_IDS), next_id + 2))
        ids.update(*((each.id, each.end_snapshot_id) for each in open_intervals))
        for name in os.listdir(self.path):
            if (found := _STAGED.fullmatch(name)) is not None:
                ids.add(int(found["snapshot_id"], 16))
        names = chain.from_iterable(map(_names_of, sorted(ids)))
        self._recover(dict.fromkeys(chain(names, self._objects.newest())))

    def recover_transfer(self, snapshot_id: int) -> None:
        """As `recover`, for what a transfer to that snapshot, or of its layers, may have left."""
        self._recover(_names_of(snapshot_id))

    def _recover(self, names: Iterable[ObjectName]) -> None:
        """As `recover`, for these objects.

        | file                                           | what becomes of it                                  |
        |------------------------------------------------|-----------------------------------------------------|
        | WAL of an open interval                        | it stays: the catalog knows it by the interval      |
        | contents of a staged transfer                  | they go back to it, so that it can be resumed       |
        | map or index that was made of it               | it is removed: it is made again                     |
        | what a closing made of an interval still there | it is removed: it is made again                     |
        | WAL of an interval that isn't there            | it is removed: it became a snapshot, or never began |
        | index that a finer one took the place of       | it is removed                                       |
        | what a removal or thinning hasn't unlinked yet | it is removed                                       |
        | any other                                      | an error: the catalog isn't this store's newest     |

        Raises:
            StoreError: there are others; then nothing was touched.
        """
        open_intervals = self._catalog.open_intervals()
        of_file = {name.file: name for name in names if name not in {interval.wal for interval in open_intervals}}
        closing = {
            ObjectName(kind, interval.end_snapshot_id)
            for interval in open_intervals if interval.mark for kind in ObjectKind
        }  # fmt: skip
        back: dict[str, str | None] = {}
        for name in map(of_file.__getitem__, self._catalog.unknown_objects(list(of_file))):
            path = self._objects.path_of(name)
            if os.path.exists(path):
                back[path] = None if name in closing else self._place_in_staging(name)
        if back:
            self._catalog.write_over()
        for path, staged in back.items():
            if staged is not None and not os.path.exists(staged):
                log.info("%s: goes back to staging, its commit didn't come about", path)
                os.rename(path, staged)
            else:
                log.info("%s: removed, it is nothing that was committed", path)
                with suppress(FileNotFoundError):  # a removal may be faster
                    os.unlink(path)

    def _place_in_staging(self, name: ObjectName) -> str | None:
        """Where contents of a staged transfer go back to; None for what is to be removed.

        Raises:
            StoreError: it is neither.
        """
        if self._is_removed(name):
            return None
        if name.kind is ObjectKind.JOURNAL_INDEX:
            interval = self._catalog.interval_to(name.snapshot_id)
            if interval is not None and interval.layer > name.layer:
                return None
        if name.kind is ObjectKind.JOURNAL_BLOCKS and self._is_outdated_wal(name):
            return None
        progress = read_progress(self.path)
        if progress is not None and progress.snapshot_id == self._catalog.next_snapshot_id():
            if name == ObjectName(ObjectKind.MAP, progress.snapshot_id):
                return None
            if name == ObjectName(ObjectKind.SNAPSHOT_BLOCKS, progress.snapshot_id):
                return os.path.join(self.path, name.file)
        for directory in self._layers_directories():
            progress = read_progress(directory)
            if progress is not None:
                layer = layer_of(progress.manifest.granularity_ns)
                if name == ObjectName(ObjectKind.JOURNAL_INDEX, progress.snapshot_id, layer):
                    return None
                if name == ObjectName(ObjectKind.JOURNAL_BLOCKS, progress.snapshot_id):
                    return os.path.join(directory, name.file)
        raise StoreError(
            f"{self._objects.path_of(name)}: the catalog doesn't have it: {CATALOG} is older than the objects, or "
            f"damaged: {REMEDY}"
        )

    def _is_outdated_wal(self, name: ObjectName) -> bool:
        """Whether it is the WAL of an open interval that became a snapshot, or of one that didn't begin."""
        number, catalog = name.snapshot_id, self._catalog
        if number == catalog.next_snapshot_id():  # the catalog has an open interval before its WAL has a write
            return os.path.getsize(self._objects.path_of(name)) <= HEADER_BYTES
        # Only a WAL has a number that no snapshot has while a snapshot has the next one, or had it before a removal.
        last = catalog.last_snapshot()
        return catalog.snapshot(number) is None and last is not None and number < last.id

    def _is_removed(self, name: ObjectName) -> bool:
        """Whether a removal of snapshots, or a thinning (`before` is `after`), is on the way to unlink it."""
        is_journal = name.kind in (ObjectKind.JOURNAL_INDEX, ObjectKind.JOURNAL_BLOCKS)
        return any(
            name.snapshot_id == before if before == after else after < name.snapshot_id < before + is_journal
            for before, after in self._catalog.removals()
        )

    def closing_directory(self, snapshot_id: int) -> str:
        """An empty directory for what is made of a closed interval."""
        path = os.path.join(self.path, f"{CLOSING_PREFIX}{snapshot_id:016x}")
        self.clear(path)
        os.mkdir(path, 0o700)
        return path

    def layers_directory(self, snapshot_id: int) -> str:
        return os.path.join(self.path, f"{LAYERS_PREFIX}{snapshot_id:016x}")

    def _layers_directories(self) -> list[str]:
        """Of layers under way or put off, oldest interval first."""
        found = (name for name in os.listdir(self.path) if name.startswith(LAYERS_PREFIX))
        names = sorted(name for name in found if _STAGED.fullmatch(name))
        return [os.path.join(self.path, name) for name in names]

    def make_room_for_layers(self, directory: str) -> None:
        """Makes the directory, and gives up the layers that were put off longest where there are too many."""
        os.makedirs(directory, 0o700, exist_ok=True)
        fsync_directory(self.path)
        others = [each for each in self._layers_directories() if each != directory]
        for other in others[: max(0, len(others) - MAX_PARKED + 1)]:
            self.recover_transfer(int(other[-16:], 16))  # while what says whose they are is there
            self.clear(other)

    def clear_outdated(self) -> None:
        """Removes staged layers that have been committed, or that nothing can follow any more, and closings."""
        for name in os.listdir(self.path):
            if name.startswith(CLOSING_PREFIX):  # made again from the WAL, or committed
                self.clear(os.path.join(self.path, name))
        for directory in self._layers_directories():
            progress = read_progress(directory)
            try:
                if progress is None:
                    raise PositionMismatchError("not whole")
                interval_of(self._catalog, progress.manifest)
            except PositionMismatchError:
                self.clear(directory)

    def clear(self, directory: str) -> None:
        """Removes what is staged there; of layers the directory, too."""
        if not os.path.isdir(directory):
            return
        for entry in list(os.scandir(directory)):
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
        if directory != self.path:
            os.rmdir(directory)
