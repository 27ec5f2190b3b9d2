"""The tree of a mount: names to entries, listings, link targets. Knows nothing of FUSE.

    root                  latest, bookmarks, times, a directory for each snapshot, and any instant that is named
    <instant> (INSTANT)   one image (IMAGE) for each volume
    bookmarks, times/<day>/<minute>, any other way to say a time: links (LINK) to an instant

An instant has one directory, named by its canonical instant. Every other name for it is a symbolic link, since two
names of one directory break the kernel's dentry cache. An entry that may change isn't `permanent`, so the kernel
doesn't cache it.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Callable
from typing import Final

from pitfs.errors import NoSuchInstantError
from pitfs.model.position import LATEST, NotATimeError, format_instant, parse_instant
from pitfs.model.transfer import VolumeInfo
from pitfs.store.store import Resolution, Store
from pitfs.view import inodes
from pitfs.view.bookmarks import bookmarks_behind
from pitfs.view.inodes import EntryType, InodeKind, NoEntryError, TreeEntry, unpack_inode
from pitfs.view.times import Listing, TimesDirectory, resolve_time

FIXED_NAMES: Final = {
    LATEST: inodes.LATEST_INODE, "bookmarks": inodes.BOOKMARKS_INODE, "times": inodes.TIMES_INODE
}  # fmt: skip
MAX_NAME_BYTES: Final = 254  # a name of 255 bytes says no time and names no volume
MAX_RESOLUTIONS: Final = 4096  # instants kept resolved, some 300 bytes each
_OF_AN_INSTANT: Final = (InodeKind.INSTANT, InodeKind.IMAGE, InodeKind.LINK)
_FIRST_COOKIE: Final = 16  # smaller cookies are those of the fixed entries


def image_name(volume: VolumeInfo) -> str:
    """The name of a volume's image in an instant's directory."""
    return f"{volume.name}.img"


class Tree:
    """The tree over one store.

    Args:
        clock_ns: what `-ago` counts from.
        zone: zone of times without `Z` or offset.
        strict: only times whose exact state is available have an entry.
    """

    def __init__(
        self, store: Store, clock_ns: Callable[[], int], zone: datetime.tzinfo = datetime.UTC, strict: bool = False
    ) -> None:
        self._store = store
        self._clock_ns = clock_ns
        self._zone = zone
        self._strict = strict
        self._times = TimesDirectory(store)
        self._volumes = {image_name(volume): index for index, volume in enumerate(store.volumes)}
        self._resolutions: dict[int, Resolution] = {}
        self._data_version = -1

    # -------------------------------------------------------------- one entry

    def lookup(self, parent: int, name: bytes) -> TreeEntry:
        """The entry `name` of the directory `parent`.

        Raises:
            NoEntryError: there is none.
        """
        if len(name) > MAX_NAME_BYTES:
            raise NoEntryError
        text = name.decode("utf-8", "replace")  # what it puts in is in no name
        if parent == inodes.ROOT_INODE:
            return self._lookup_root(text)
        if parent == inodes.BOOKMARKS_INODE:
            bookmark = self._store.bookmark(text)
            if bookmark is None:
                raise NoEntryError
            return inodes.link_entry(bookmark.seq, bookmark.time_ns, 1)
        if parent == inodes.TIMES_INODE:
            return self._times.day(text)
        kind, _, number = unpack_inode(parent)
        if kind is InodeKind.INSTANT and text in self._volumes:
            return self._image(self.resolution(number), self._volumes[text])
        if kind is InodeKind.DAY:
            return self._times.minute(number, text)
        if kind is InodeKind.MINUTE:
            return self._times.second(number, text)
        raise NoEntryError

    def _lookup_root(self, name: str) -> TreeEntry:
        if name in FIXED_NAMES:
            return self._fixed(FIXED_NAMES[name])
        self._forget_if_changed()
        canonical_ns = parse_instant(name)
        if canonical_ns is not None:
            resolution = self._store.at_instant(canonical_ns)
            if resolution is not None:
                self._resolutions[resolution.seq] = resolution  # its images are looked up next
                return inodes.instant_entry(resolution.seq, resolution.time_ns)
        try:
            resolution, exact = resolve_time(self._store, name, self._clock_ns(), self._zone)
        except (NotATimeError, NoSuchInstantError):
            raise NoEntryError from None
        if self._strict and not exact:
            raise NoEntryError
        self._resolutions[resolution.seq] = resolution  # the link is read next
        return inodes.link_entry(resolution.seq, resolution.time_ns, 0)

    def entry(self, inode: int) -> TreeEntry:
        """The entry with that number.

        Raises:
            NoEntryError: it is gone, or was never there.
        """
        kind, minor, number = unpack_inode(inode)
        if kind is InodeKind.FIXED:
            return self._fixed(inode)
        if kind is InodeKind.DAY:
            return inodes.day_entry(number)
        if kind is InodeKind.MINUTE:
            return inodes.minute_entry(number)
        resolution = self.resolution(number)
        if kind is InodeKind.INSTANT:
            return inodes.instant_entry(resolution.seq, resolution.time_ns)
        if kind is InodeKind.LINK:
            return inodes.link_entry(resolution.seq, resolution.time_ns, minor)
        return self._image(resolution, minor)

    def _fixed(self, inode: int) -> TreeEntry:
        latest = self._store.latest()
        mtime_ns = latest.time_ns if latest else 0
        if inode == inodes.LATEST_INODE and latest:
            return TreeEntry(inode, EntryType.LINK, mtime_ns, inodes.INSTANT_BYTES)
        if inode not in (inodes.ROOT_INODE, inodes.BOOKMARKS_INODE, inodes.TIMES_INODE):
            raise NoEntryError
        return TreeEntry(inode, EntryType.DIRECTORY, mtime_ns)

    def _image(self, resolution: Resolution, volume: int) -> TreeEntry:
        if volume >= len(self._store.volumes):
            raise NoEntryError
        size_bytes = self._store.volumes[volume].size_bytes
        return inodes.image_entry(resolution.seq, resolution.time_ns, volume, size_bytes)

    def target(self, inode: int) -> str:
        """Where the link leads.

        Raises:
            NoEntryError: it is no link, or leads nowhere.
        """
        if inode == inodes.LATEST_INODE:
            latest = self._store.latest()
            if latest is None:
                raise NoEntryError
            return format_instant(latest.time_ns)
        kind, depth, seq = unpack_inode(inode)
        if kind is not InodeKind.LINK:
            raise NoEntryError
        return "../" * depth + format_instant(self.resolution(seq).time_ns)

    # -------------------------------------------------------------- resolved states

    def knows(self, inode: int) -> bool:
        """Whether requests about this entry are answered from memory, without waiting for the disk."""
        return inode >> inodes.KIND_SHIFT in _OF_AN_INSTANT and inode & inodes.MAX_SEQ in self._resolutions

    def resolution(self, seq: int) -> Resolution:
        """The reachable state at exactly `seq`, from the cache where it is there.

        Raises:
            NoEntryError: it can't be reached (any more).
        """
        resolution = self._resolutions.get(seq)
        if resolution is None:
            self._forget_if_changed()
            try:
                resolution = self._store.at_seq(seq)
            except NoSuchInstantError:
                raise NoEntryError from None
            if resolution.seq != seq:
                raise NoEntryError
            self._resolutions[seq] = resolution
        return resolution

    def _forget_if_changed(self) -> None:
        """Empties the cache where a commit may have taken states back, and where it is full."""
        version = self._store.data_version()
        if version != self._data_version or len(self._resolutions) >= MAX_RESOLUTIONS:
            self._resolutions.clear()
            self._data_version = version

    def is_current(self) -> bool:
        """Whether nothing was committed since: all states in the cache can be reached."""
        return self._store.data_version() == self._data_version

    def resolution_of(self, inode: int, anew: bool = False) -> Resolution | None:
        """The state of an instant's directory or image, `anew` as the catalog is now; None for any other entry."""
        if anew:
            self._forget_if_changed()
        kind, _, seq = unpack_inode(inode)
        return self.resolution(seq) if kind in (InodeKind.INSTANT, InodeKind.IMAGE) else None

    def attributes_of(self, inode: int) -> dict[bytes, bytes]:
        """The extended attributes of an instant's directory or image, none of any other entry: the contract's.

        `user.pitfs.gap` is there where a gap begins or ends at the state: its bounds and cause, a line for each.
        """
        state = self.resolution_of(inode)
        if state is None:
            return {}
        attributes = {
            b"user.pitfs.seq": b"%d" % state.seq,
            b"user.pitfs.time": format_instant(state.time_ns).encode(),
            b"user.pitfs.kind": state.kind.encode(),
            b"user.pitfs.granularity": b"null" if state.granularity_ns is None else b"%d" % state.granularity_ns,
        }
        gaps = [
            f"{format_instant(gap.from_time_ns)} -> {format_instant(gap.to_time_ns)}: {gap.cause}"
            for gap in self._store.gaps(state.time_ns, state.time_ns + 1)
        ]
        return attributes | ({b"user.pitfs.gap": "\n".join(gaps).encode()} if gaps else {})

    # -------------------------------------------------------------- listings

    def listing(self, inode: int, cookie: int) -> Listing:
        """(name, entry, cookie of what follows) of a directory, from `cookie` (0: from the start) on.

        In the order of time, as the store pages it. A cookie is a place, not a count: entries that come or go
        meanwhile make no other entry appear twice or not at all.

        Raises:
            NoEntryError: it is no directory, or gone.
        """
        if inode == inodes.ROOT_INODE:
            return self._list_root(cookie)
        kind, _, number = unpack_inode(inode)
        if kind is InodeKind.INSTANT:
            state = self.resolution(number)
            images = itertools.islice(self._volumes.items(), cookie, None)
            return ((name, self._image(state, index), index + 1) for name, index in images)
        first = max(cookie - _FIRST_COOKIE, 0)
        if inode == inodes.BOOKMARKS_INODE:
            found: Listing = (
                (bookmark.name, inodes.link_entry(bookmark.seq, bookmark.time_ns, 1), following)
                for bookmark, following in bookmarks_behind(self._store, first)
            )
        elif inode == inodes.TIMES_INODE:
            found = self._times.days(first)
        elif kind is InodeKind.DAY:
            found = self._times.minutes(number, first)
        elif kind is InodeKind.MINUTE:
            found = self._times.seconds(number, first)
        else:
            raise NoEntryError
        return ((name, entry, following + _FIRST_COOKIE) for name, entry, following in found)

    def _list_root(self, cookie: int) -> Listing:
        for number, (name, inode) in enumerate(FIXED_NAMES.items(), 1):
            if cookie < number and not (inode == inodes.LATEST_INODE and self._store.latest() is None):
                yield name, self._fixed(inode), number
        for snapshot in self._store.snapshots(max(cookie - _FIRST_COOKIE + 1, 0)):
            entry = inodes.instant_entry(snapshot.seq, snapshot.time_ns)
            yield format_instant(snapshot.time_ns), entry, snapshot.time_ns + _FIRST_COOKIE
