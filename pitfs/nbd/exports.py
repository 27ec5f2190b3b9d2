"""The exports: names of the mount's tree, without the suffix of images, lead to views of a volume.

    2026-11-22T23-54-00.123456789Z/root    the canonical name
    latest/root, 5m-ago/root, bookmarks/before-upgrade/root, times/2026-11-22/23-54/23-54-07/root, …

All names of an instant in the tree are valid here. A name is resolved when a client opens it.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pitfs.errors import NoSuchInstantError, PitfsError
from pitfs.model.position import LATEST, format_instant
from pitfs.nbd.negotiation import ExportInfo
from pitfs.view.inodes import ROOT_INODE, EntryType, NoEntryError
from pitfs.view.tree import Tree
from pitfs.view.view import PointInTimeView, TableCache

if TYPE_CHECKING:
    from pitfs.store.pins.pins import Pins
    from pitfs.store.store import Store

MAX_LISTED_SNAPSHOTS: Final = 100  # the newest; a client may ask about each that is listed
MAX_VIEWS: Final = 256  # with resolved tables at hand, shared by connections to one instant; some 300 bytes each


class NoSuchExportError(PitfsError):
    """Nothing in the tree has that name."""


@dataclass(frozen=True, slots=True)
class Export:
    info: ExportInfo
    view: PointInTimeView


class Exports:
    """The exports of one store. For one thread at a time, as the tree is; the views that it gives are for any."""

    def __init__(self, store: Store, tree: Tree, pins: Pins) -> None:
        self._store = store
        self._tree = tree
        self._pins = pins
        view_of = functools.partial(PointInTimeView, store, tables=TableCache())
        self._view_of = functools.lru_cache(MAX_VIEWS)(view_of)

    def find(self, name: str, *, opens: bool) -> Export:
        """The export that a name leads to now.

        Args:
            opens: and hold its instant, until `close`.

        Raises:
            NoSuchExportError: there is none; says why.
            PitfsError: reading the store fails.
        """
        path, _, volume = name.rpartition("/")
        names = [each.name for each in self._store.volumes]
        if not path:
            raise NoSuchExportError(f"no export {name!r}: say a time and a volume, as in {LATEST}/{names[0]}")
        try:
            instant = functools.reduce(self._child, path.split("/"), ROOT_INODE)
            resolution = self._tree.resolution_of(instant)
        except NoEntryError:
            resolution = None
        if resolution is None:
            raise NoSuchExportError(f"no export {name!r}: nothing can be reached at {path!r}: see `pitfs list`")
        if volume not in names:
            raise NoSuchExportError(f"no export {name!r}: the volumes are {', '.join(names)}")
        if opens:
            try:
                resolution = self._pins.pinned(self._store, resolution)
            except NoSuchInstantError as error:
                raise NoSuchExportError(f"no export {name!r}: {error}") from None
        view = self._view_of(resolution, names.index(volume))
        canonical = f"{format_instant(resolution.time_ns)}/{volume}"
        description = f"volume {volume} of group {self._store.group}, {resolution.kind}, seq {resolution.seq}"
        return Export(ExportInfo(canonical, description, view.size_bytes, view.block_size), view)

    def close(self, export: Export) -> None:
        """Unpins the instant of an export that was opened."""
        self._pins.unpin(export.view.resolution.seq)

    def listed(self) -> list[tuple[str, str]]:
        """(name, description) of latest and of the newest snapshots, newest first, of each volume."""
        latest = self._store.latest()
        if latest is None:
            return []
        instants = [(LATEST, f"the newest instant, {format_instant(latest.time_ns)} now")]
        newest = itertools.islice(self._store.newest_snapshots(), MAX_LISTED_SNAPSHOTS)
        instants += [(format_instant(each.time_ns), f"snapshot, seq {each.seq}") for each in newest]
        return [
            (f"{instant}/{volume.name}", description)
            for instant, description in instants
            for volume in self._store.volumes
        ]

    def _child(self, directory: int, name: str) -> int:
        entry = self._tree.lookup(directory, name.encode())
        if entry.type is EntryType.LINK:  # in any directory, to an instant in the root
            target = self._tree.target(entry.inode).rpartition("/")[2]
            entry = self._tree.lookup(ROOT_INODE, target.encode())
        return entry.inode
