"""Transfers and closings under way, or put off, and what is left of those that didn't come about."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Final

from pitfs.errors import PositionMismatchError, StoreError
from pitfs.model.ladder import RUNGS_NS, layer_of
from pitfs.storage.files import fsync_directory
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.objects.format import (
    CATALOG,
    HEADER_BYTES,
    ObjectKind,
    index_of,
    is_object_file,
    journal_blocks_of,
    object_file,
)
from pitfs.store.transfer.layers import interval_of
from pitfs.store.transfer.staging import read_progress

log = logging.getLogger(__name__)

MAX_PARKED: Final = 8  # transfers of layers that are put off: each may take as much disk as its interval's journal
LAYERS_PREFIX: Final = "layers-"
CLOSING_PREFIX: Final = "closing-"


class StagingArea:
    """staging/ of a store: the transfer that leads to the next mark in itself, layers in a directory of their own.

    Args:
        path: of staging/; objects: of objects/.
    """

    def __init__(self, path: str, objects: str, catalog: Catalog) -> None:
        self.path, self._objects, self._catalog = path, objects, catalog

    def settle(self, names: Sequence[str]) -> None:
        """Deals with files in objects/ that the catalog doesn't know: of a commit that didn't come about.

        Contents of a staged transfer go back to it, what was built of it is removed, and so is an index that a finer
        one took the place of, what a closing made of a tail that is there still, and the log of one that isn't.
        Others are nobody's to remove here: rather than theirs, the catalog isn't this store's newest.

        Raises:
            StoreError: there are others.
        """
        unknown = self._catalog.unknown_objects([name for name in names if is_object_file(name)])
        tails = self._catalog.open_intervals()
        logs = {object_file(ObjectKind.JOURNAL_BLOCKS, tail.id) for tail in tails}
        made = {name for tail in tails if tail.mark for name in _objects_of(tail.end_snapshot_id)}
        found = [name for name in unknown if name not in logs and os.path.exists(os.path.join(self._objects, name))]
        of_tails = {name for name in found if name in made or self._is_outdated_log(name)}
        homes = {name: self.path if name in of_tails else self._home_of(name) for name in found}
        for name, home in homes.items():
            if home is None:
                raise StoreError(
                    f"{os.path.join(self._objects, name)}: the catalog doesn't have it: {CATALOG} is older "
                    f"than the objects, or damaged: put the newest copy of it back, or move the store away "
                    f"(what it has stays readable) and a new one is made"
                )
        if found:
            self._catalog.write_over()
        for name, home in homes.items():
            path, back = os.path.join(self._objects, name), os.path.join(home or "", name)
            if name.endswith(".blocks") and name not in of_tails and not os.path.exists(back):
                log.info("%s: goes back to staging, its commit didn't come about", path)
                os.rename(path, back)
            else:
                log.info("%s: removed, it is nothing that was committed", path)
                os.unlink(path)

    def _is_outdated_log(self, name: str) -> bool:
        """Whether it is the log of a tail that became an interval, or of one that didn't begin."""
        tail, catalog = journal_blocks_of(name), self._catalog
        if tail is None:
            return False
        if tail == catalog.next_snapshot_id():  # the catalog has a tail before anything is written to its log
            return os.path.getsize(os.path.join(self._objects, name)) <= HEADER_BYTES
        # Numbers without a snapshot before one that has one are those of logs.
        return catalog.snapshot(tail) is None and catalog.snapshot(tail + 1) is not None

    def _home_of(self, name: str) -> str | None:
        """The directory of the staged transfer that made an object which the catalog doesn't know."""
        index = index_of(name)
        if index is not None:
            interval = self._catalog.interval_to(index[0])
            if interval is not None and interval.layer > index[1]:
                return self.path  # replaced by a finer one
        progress = read_progress(self.path)
        if progress is not None and progress.snapshot == self._catalog.next_snapshot_id():
            kinds = ObjectKind.MAP, ObjectKind.SNAPSHOT_BLOCKS
            if name in {object_file(kind, progress.snapshot) for kind in kinds}:
                return self.path
        for directory in self._layers_directories():
            progress = read_progress(directory)
            if progress is not None:
                layer = layer_of(progress.manifest.granularity_ns)
                made = object_file(ObjectKind.JOURNAL_INDEX, progress.snapshot, layer)
                if name in (made, object_file(ObjectKind.JOURNAL_BLOCKS, progress.snapshot)):
                    return directory
        return None

    def settle_transfer(self, snapshot: int) -> None:
        kinds = ObjectKind.MAP, ObjectKind.SNAPSHOT_BLOCKS, ObjectKind.JOURNAL_BLOCKS
        indexes = [object_file(ObjectKind.JOURNAL_INDEX, snapshot, layer) for layer in range(len(RUNGS_NS))]
        self.settle([*(object_file(kind, snapshot) for kind in kinds), *indexes])

    def closing_directory(self, snapshot: int) -> str:
        """An empty directory for what is made of a closed tail."""
        path = os.path.join(self.path, f"{CLOSING_PREFIX}{snapshot:016x}")
        self.clear(path)
        os.mkdir(path, 0o700)
        return path

    def layers_directory(self, snapshot: int) -> str:
        return os.path.join(self.path, f"{LAYERS_PREFIX}{snapshot:016x}")

    def _layers_directories(self) -> list[str]:
        """Of layers under way or put off, oldest interval first."""
        names = sorted(name for name in os.listdir(self.path) if name.startswith(LAYERS_PREFIX))
        return [os.path.join(self.path, name) for name in names]

    def make_room_for_layers(self, directory: str) -> None:
        """Makes the directory, and gives up the layers that were put off longest where there are too many."""
        os.makedirs(directory, 0o700, exist_ok=True)
        fsync_directory(self.path)
        others = [each for each in self._layers_directories() if each != directory]
        for other in others[: max(0, len(others) - MAX_PARKED + 1)]:
            self.clear(other)

    def clear_outdated(self) -> None:
        """Removes staged layers that have been committed, or that nothing can follow any more, and closings."""
        for name in os.listdir(self.path):
            if name.startswith(CLOSING_PREFIX):  # made again from the log, or committed
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


def _objects_of(snapshot: int) -> list[str]:
    """What a closing may make."""
    return [object_file(kind, snapshot) for kind in ObjectKind]
