"""The tree of a mount: names to entries, listings, link targets. Knows nothing of FUSE.

Nothing is counted or stored: an inode number says all there is to know about its entry.

    bits 60..63  0
    bits 56..59  kind
    bits 46..55  volume of an image; directories between a link and the root
    bits  0..45  seq; day or minute since 1970; which of the fixed entries

    root (1)              latest, bookmarks, times, a directory for each snapshot, and whatever is asked for
    <instant> (INSTANT)   one image (IMAGE) for each volume
    bookmarks, times/<day>/<minute>, any other way to say a time: links (LINK) to an instant

An instant has one directory, named by its canonical instant; whatever else leads there is a symbolic link,
since two names of one directory break the kernel's dentry cache. days and minutes of times/ are UTC, as the
instants are. An entry that may change isn't `permanent`: the kernel mustn't keep it.
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from pitfs.errors import NoSuchInstantError, StoreError
from pitfs.model.position import (
    DAY_NS,
    MINUTE_NS,
    SECOND_NS,
    NotATimeError,
    format_day,
    format_instant,
    parse_instant,
)
from pitfs.model.transfer import VolumeInfo
from pitfs.view.attributes import extended_attributes
from pitfs.view.bookmarks import bookmarks_behind
from pitfs.view.times import resolve_time

if TYPE_CHECKING:
    from pitfs.store.store import Resolution, Store

LATEST: Final = "latest"
BOOKMARKS: Final = "bookmarks"
TIMES: Final = "times"
GAP: Final = "-gap"  # behind the second in which one begins: a link to the last state before it
MAX_NAME_BYTES: Final = 254  # a name of 255 bytes says no time and names no volume

SEQ_BITS: Final = 46  # 70,000,000,000,000 writes: 22 years of 100,000 a second
MAX_SEQ: Final = (1 << SEQ_BITS) - 1
MAX_VOLUMES: Final = 1 << 10
_MINOR_SHIFT: Final = SEQ_BITS
_KIND_SHIFT: Final = 56
MAX_RESOLUTIONS: Final = 4096  # instants kept resolved, some 300 bytes each

_COOKIE_BASE: Final = 16  # cookies below are those of the fixed entries

_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", re.ASCII)
_MINUTE = re.compile(r"([01][0-9]|2[0-3])-([0-5][0-9])", re.ASCII)
_SECOND = re.compile(r"([01][0-9]|2[0-3])-([0-5][0-9])-([0-5][0-9])(-gap)?", re.ASCII)


class NoEntryError(Exception):
    """There is nothing of that name or number (any more)."""


class InodeKind(enum.IntEnum):
    FIXED = 0
    INSTANT = 1
    IMAGE = 2
    LINK = 3
    DAY = 4
    MINUTE = 5


_OF_AN_INSTANT: Final = (InodeKind.INSTANT, InodeKind.IMAGE, InodeKind.LINK)

ROOT_INODE: Final = 1
LATEST_INODE: Final = 2
BOOKMARKS_INODE: Final = 3
TIMES_INODE: Final = 4


class EntryType(enum.Enum):
    DIRECTORY = 1
    FILE = 2
    LINK = 3


@dataclasses.dataclass(frozen=True, slots=True)
class TreeEntry:
    """What stat(2) would tell.

    Attributes:
        mtime_ns: the instant, for what belongs to one; else the newest instant.
        permanent: it will never be anything else under this name.
    """

    inode: int
    type: EntryType
    mtime_ns: int
    size: int = 0
    nlink: int = 1
    permanent: bool = False


def pack_inode(kind: InodeKind, minor: int, major: int) -> int:
    return kind << _KIND_SHIFT | minor << _MINOR_SHIFT | major


def unpack_inode(inode: int) -> tuple[InodeKind, int, int]:
    """(kind, volume or depth, seq or number).

    Raises:
        NoEntryError: it's none of ours.
    """
    try:
        kind = InodeKind(inode >> _KIND_SHIFT)
    except ValueError:
        raise NoEntryError from None
    return kind, inode >> _MINOR_SHIFT & (MAX_VOLUMES - 1), inode & MAX_SEQ


def image_name(volume: VolumeInfo) -> str:
    """The name of a volume's image in an instant's directory."""
    return f"{volume.name}.img"


class Tree:
    """The tree over one store.

    Args:
        clock_ns: what `-ago` counts from.
        zone: zone of times without `Z` or offset.
        strict: only times whose state can be given exactly lead anywhere.
    """

    def __init__(
        self,
        store: Store,
        clock_ns: Callable[[], int],
        zone: datetime.tzinfo = datetime.UTC,
        strict: bool = False,
    ) -> None:
        if len(store.volumes) > MAX_VOLUMES:
            raise StoreError(
                f"{store.path}: {len(store.volumes)} volumes, a mount shows {MAX_VOLUMES}: use `pitfs export`"
            )
        self._store = store
        self._clock_ns = clock_ns
        self._zone = zone
        self._strict = strict
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
        try:
            text = name.decode("utf-8")
        except UnicodeDecodeError:
            raise NoEntryError from None
        if parent == ROOT_INODE:
            return self._lookup_root(text)
        if parent == BOOKMARKS_INODE:
            bookmark = self._store.bookmark(text)
            if bookmark is None:
                raise NoEntryError
            return self._link(bookmark.seq, bookmark.time_ns, 1)
        if parent == TIMES_INODE:
            return self._lookup_day(text)
        kind, _, number = unpack_inode(parent)
        if kind is InodeKind.INSTANT:
            volume = self._volumes.get(text)
            if volume is None:
                raise NoEntryError
            return self._image(self.resolution(number), volume)
        if kind is InodeKind.DAY:
            return self._lookup_minute(number, text)
        if kind is InodeKind.MINUTE:
            return self._lookup_second(number, text)
        raise NoEntryError

    def entry(self, inode: int) -> TreeEntry:
        """The entry with that number.

        Raises:
            NoEntryError: it is gone, or was never there.
        """
        kind, minor, number = unpack_inode(inode)
        if kind is InodeKind.FIXED:
            if inode not in (ROOT_INODE, LATEST_INODE, BOOKMARKS_INODE, TIMES_INODE):
                raise NoEntryError
            return self._fixed(inode)
        if kind is InodeKind.DAY:
            return TreeEntry(inode, EntryType.DIRECTORY, number * DAY_NS)
        if kind is InodeKind.MINUTE:
            return TreeEntry(inode, EntryType.DIRECTORY, number * MINUTE_NS)
        resolution = self.resolution(number)
        if kind is InodeKind.INSTANT:
            return self._instant(resolution.seq, resolution.time_ns)
        if kind is InodeKind.LINK:
            return self._link(resolution.seq, resolution.time_ns, minor)
        if minor >= len(self._store.volumes):
            raise NoEntryError
        return self._image(resolution, minor)

    def target(self, inode: int) -> str:
        """Where the link leads.

        Raises:
            NoEntryError: it is no link, or leads nowhere.
        """
        if inode == LATEST_INODE:
            latest = self._store.latest()
            if latest is None:
                raise NoEntryError
            return format_instant(latest.time_ns)
        kind, depth, seq = unpack_inode(inode)
        if kind is not InodeKind.LINK:
            raise NoEntryError
        return "../" * depth + format_instant(self.resolution(seq).time_ns)

    def knows(self, inode: int) -> bool:
        """Whether anything asked of this entry is answered from memory, without waiting for the disk."""
        return inode >> _KIND_SHIFT in _OF_AN_INSTANT and inode & MAX_SEQ in self._resolutions

    def resolution(self, seq: int) -> Resolution:
        """The reachable state at exactly `seq`; one that is known isn't asked for again.

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
        """Before a state is resolved: what was taken back since the last commit isn't known for ever."""
        version = self._store.data_version()
        if version != self._data_version or len(self._resolutions) >= MAX_RESOLUTIONS:
            self._resolutions.clear()
            self._data_version = version

    def is_current(self) -> bool:
        """Whether nothing was committed since: the known states can all be reached."""
        return self._store.data_version() == self._data_version

    def resolution_of(self, inode: int, anew: bool = False) -> Resolution | None:
        """What an instant's directory or image shows, `anew` as the catalog is now; None for any other entry."""
        if anew:
            self._forget_if_changed()
        kind, _, seq = unpack_inode(inode)
        return self.resolution(seq) if kind in (InodeKind.INSTANT, InodeKind.IMAGE) else None

    def attributes_of(self, inode: int) -> dict[bytes, bytes]:
        """The extended attributes of an instant's directory or image; none of any other entry."""
        resolution = self.resolution_of(inode)
        return extended_attributes(self._store, resolution) if resolution is not None else {}

    # -------------------------------------------------------------- listings

    def listing(self, inode: int, cookie: int) -> Iterator[tuple[str, TreeEntry, int]]:
        """(name, entry, cookie of what follows) of a directory, from `cookie` (0: from the start) on.

        In the order of time, as the store pages it. A cookie says what it stands behind, not how many: what
        comes or goes meanwhile makes nothing else appear twice or not at all.

        Raises:
            NoEntryError: it is no directory, or gone.
        """
        if inode == ROOT_INODE:
            return self._list_root(cookie)
        if inode == BOOKMARKS_INODE:
            return self._list_bookmarks(cookie)
        if inode == TIMES_INODE:
            return self._list_days(cookie)
        kind, _, number = unpack_inode(inode)
        if kind is InodeKind.INSTANT:
            return self._list_images(self.resolution(number), cookie)
        if kind is InodeKind.DAY:
            return self._list_minutes(number, cookie)
        if kind is InodeKind.MINUTE:
            return self._list_seconds(number, cookie)
        raise NoEntryError

    def _list_root(self, cookie: int) -> Iterator[tuple[str, TreeEntry, int]]:
        fixed = ((LATEST, LATEST_INODE), (BOOKMARKS, BOOKMARKS_INODE), (TIMES, TIMES_INODE))
        for number, (name, inode) in enumerate(fixed, 1):
            if cookie < number and not (inode == LATEST_INODE and self._store.latest() is None):
                yield name, self._fixed(inode), number
        after_ns = cookie - _COOKIE_BASE if cookie >= _COOKIE_BASE else -1
        for snapshot in self._store.snapshots(after_ns + 1):
            entry = self._instant(snapshot.seq, snapshot.time_ns)
            yield format_instant(snapshot.time_ns), entry, snapshot.time_ns + _COOKIE_BASE

    def _list_images(self, resolution: Resolution, cookie: int) -> Iterator[tuple[str, TreeEntry, int]]:
        for index, volume in enumerate(self._store.volumes):
            if index >= cookie:
                yield image_name(volume), self._image(resolution, index), index + 1

    def _list_bookmarks(self, cookie: int) -> Iterator[tuple[str, TreeEntry, int]]:
        for bookmark, following in bookmarks_behind(self._store, max(cookie - _COOKIE_BASE, 0)):
            yield bookmark.name, self._link(bookmark.seq, bookmark.time_ns, 1), following + _COOKIE_BASE

    def _list_days(self, cookie: int) -> Iterator[tuple[str, TreeEntry, int]]:
        for day in self._store.days(max(cookie - _COOKIE_BASE, 0)):
            yield format_day(day), self._day(day), day + _COOKIE_BASE + 1

    def _list_minutes(self, day: int, cookie: int) -> Iterator[tuple[str, TreeEntry, int]]:
        for minute in self._store.minutes(day):
            if minute + _COOKIE_BASE >= cookie:
                yield _clock_name(minute * 60)[:5], self._minute(minute), minute + _COOKIE_BASE + 1

    def _list_seconds(self, minute: int, cookie: int) -> Iterator[tuple[str, TreeEntry, int]]:
        for resolution in self._store.seconds(minute):
            second = resolution.time_ns // SECOND_NS
            number = 2 * second + _COOKIE_BASE
            if number >= cookie:
                yield _clock_name(second), self._link(resolution.seq, resolution.time_ns, 3), number + 1
            if number + 1 >= cookie and (before := self._before_gap(second)) is not None:
                yield _clock_name(second) + GAP, self._link(before.seq, before.time_ns, 3), number + 2

    # -------------------------------------------------------------- names

    def _lookup_root(self, name: str) -> TreeEntry:
        if name == LATEST:
            if self._store.latest() is None:
                raise NoEntryError
            return self._fixed(LATEST_INODE)
        if name == BOOKMARKS:
            return self._fixed(BOOKMARKS_INODE)
        if name == TIMES:
            return self._fixed(TIMES_INODE)
        self._forget_if_changed()
        canonical_ns = parse_instant(name)
        if canonical_ns is not None:
            resolution = self._store.at_instant(canonical_ns)
            if resolution is not None:
                self._resolutions[resolution.seq] = resolution  # its images are asked for next
                return self._instant(resolution.seq, resolution.time_ns)
        try:
            resolution, exact = resolve_time(self._store, name, self._clock_ns(), self._zone)
        except (NotATimeError, NoSuchInstantError):
            raise NoEntryError from None
        if self._strict and not exact:
            raise NoEntryError
        self._resolutions[resolution.seq] = resolution  # the link is read next
        return self._link(resolution.seq, resolution.time_ns, 0)

    def _lookup_day(self, name: str) -> TreeEntry:
        if not _DAY.fullmatch(name):
            raise NoEntryError
        start_ns = parse_instant(f"{name}T00-00-00.000000000Z")
        if start_ns is None:
            raise NoEntryError
        self._last_in(start_ns, start_ns + DAY_NS)
        return self._day(start_ns // DAY_NS)

    def _lookup_minute(self, day: int, name: str) -> TreeEntry:
        match = _MINUTE.fullmatch(name)
        if match is None:
            raise NoEntryError
        minute = day * 1440 + int(match[1]) * 60 + int(match[2])
        self._last_in(minute * MINUTE_NS, (minute + 1) * MINUTE_NS)
        return self._minute(minute)

    def _lookup_second(self, minute: int, name: str) -> TreeEntry:
        match = _SECOND.fullmatch(name)
        if match is None or int(match[1]) * 60 + int(match[2]) != minute % 1440:
            raise NoEntryError
        start_ns = minute * MINUTE_NS + int(match[3]) * SECOND_NS
        last = self._last_in(start_ns, start_ns + SECOND_NS)
        resolution = self._before_gap(start_ns // SECOND_NS) if match[4] else last
        if resolution is None:
            raise NoEntryError
        return self._link(resolution.seq, resolution.time_ns, 3)

    def _before_gap(self, second: int) -> Resolution | None:
        """The last state before the gap that begins in that second since 1970, if one does."""
        start_ns, end_ns = second * SECOND_NS, (second + 1) * SECOND_NS
        begin = next((gap for gap in self._store.gaps(start_ns, end_ns) if gap.from_time_ns >= start_ns), None)
        return self._store.at_instant(begin.from_time_ns) if begin is not None else None

    def _last_in(self, start_ns: int, end_ns: int) -> Resolution:
        """The newest reachable state whose time is in [start, end); NoEntryError if there is none."""
        latest = self._store.latest()
        if latest is None:
            raise NoEntryError
        try:
            resolution, _ = self._store.at_time(min(end_ns - 1, latest.time_ns))
        except NoSuchInstantError:
            raise NoEntryError from None
        if not start_ns <= resolution.time_ns < end_ns:
            raise NoEntryError
        return resolution

    # -------------------------------------------------------------- entries

    def _fixed(self, inode: int) -> TreeEntry:
        latest = self._store.latest()
        mtime_ns = latest.time_ns if latest else 0
        if inode == LATEST_INODE:
            return TreeEntry(inode, EntryType.LINK, mtime_ns, size=len(format_instant(mtime_ns)))
        return TreeEntry(inode, EntryType.DIRECTORY, mtime_ns)

    def _instant(self, seq: int, time_ns: int) -> TreeEntry:
        return TreeEntry(pack_inode(InodeKind.INSTANT, 0, seq), EntryType.DIRECTORY, time_ns, nlink=2, permanent=True)

    def _image(self, resolution: Resolution, volume: int) -> TreeEntry:
        size = self._store.volumes[volume].size_bytes
        inode = pack_inode(InodeKind.IMAGE, volume, resolution.seq)
        return TreeEntry(inode, EntryType.FILE, resolution.time_ns, size=size, permanent=True)

    def _link(self, seq: int, time_ns: int, depth: int) -> TreeEntry:
        size = 3 * depth + len(format_instant(time_ns))
        return TreeEntry(pack_inode(InodeKind.LINK, depth, seq), EntryType.LINK, time_ns, size=size)

    def _day(self, day: int) -> TreeEntry:
        return TreeEntry(pack_inode(InodeKind.DAY, 0, day), EntryType.DIRECTORY, day * DAY_NS)

    def _minute(self, minute: int) -> TreeEntry:
        return TreeEntry(pack_inode(InodeKind.MINUTE, 0, minute), EntryType.DIRECTORY, minute * MINUTE_NS)


def _clock_name(second: int) -> str:
    """`HH-MM-SS` of a second since 1970."""
    second %= 86_400
    return f"{second // 3600:02d}-{second // 60 % 60:02d}-{second % 60:02d}"
