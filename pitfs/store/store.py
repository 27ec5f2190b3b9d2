"""The store as readers see it: instants, and where the blocks of an image at one stand (figure 8).

Any number of processes read while the writer goes on: what was committed never changes, and what isn't
committed isn't seen. A Store may be used from several threads; it is opened after a fork, not carried over.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
from typing import Final, ParamSpec, TypeVar

from pitfs.errors import CorruptionError, NoSuchInstantError
from pitfs.model.blockmap import FANOUT, FANOUT_BITS, U64Array
from pitfs.model.position import Position
from pitfs.model.transfer import Bookmark, Gap
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.catalog.records import Interval, OpenInterval, Resolution, Snapshot
from pitfs.store.identity import read_store_info
from pitfs.store.index.block_maps import NodeReader, SnapshotMap
from pitfs.store.index.reader import JournalIndex, chunk_cache
from pitfs.store.objects.cache import Cache
from pitfs.store.objects.format import CATALOG, OBJECTS, ObjectKind, object_file
from pitfs.store.objects.pool import MissingObjectError, ObjectPool, reading_limit
from pitfs.store.open_interval.reader import OpenIntervals

__all__ = ["Resolution", "Store"]

P = ParamSpec("P")
T = TypeVar("T")

MAX_CACHED_MAPS: Final = 256  # snapshots whose roots are kept
MAX_CACHED_FENCE_BYTES: Final = 4 << 20  # fence tables of journals: 40 bytes for 2048 entries, 300 KB for 10**7
_MINUTES_OF_DAY: Final = 24 * 60
_SECOND_NS: Final = 1_000_000_000
_FENCE_OVERHEAD_BYTES: Final = 1024


def _again_if_replaced(method: Callable[P, T]) -> Callable[P, T]:
    """Asks once more where an index or a log is missing: what took its place is in the catalog by now."""

    @wraps(method)
    def ask(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        except MissingObjectError:
            return method(*args, **kwargs)

    return ask


class Store:
    """The read side of one group's store; made by `Store.open`.

    All methods raise CorruptionError where the catalog or an object isn't what was written, and PitfsError
    where the disk refuses.
    """

    def __init__(self, path: str) -> None:
        info = read_store_info(path)
        self.path = path
        self.group = info.group
        self.history = info.history
        self.volumes = info.volumes
        self._catalog = Catalog(os.path.join(path, CATALOG))
        history = bytes.fromhex(info.history)
        self.objects = ObjectPool(os.path.join(path, OBJECTS), history, reading_limit())
        self._nodes = NodeReader(self.objects)
        self._chunks = chunk_cache()
        self._maps: Cache[int, SnapshotMap] = Cache(MAX_CACHED_MAPS)
        self._journals: Cache[tuple[int, int], JournalIndex] = Cache(
            MAX_CACHED_FENCE_BYTES, lambda journal: journal.sparse_index_bytes + _FENCE_OVERHEAD_BYTES
        )
        self._tails = OpenIntervals(self._catalog, self.objects, self._chunks)

    @classmethod
    def open(cls, path: str) -> Store:
        """Opens the store for reading.

        Raises:
            StoreError: it isn't one; the message says what is missing.
            StoreVersionError: a newer pitfs made it.
        """
        return cls(path)

    def close(self) -> None:
        self._catalog.close()
        self.objects.close()

    def data_version(self) -> int:
        """A number that changes when something was committed."""
        return self._catalog.data_version()

    # Instants

    def first(self) -> Resolution | None:
        """The oldest state, None in an empty store."""
        snapshot = self._catalog.first_snapshot()
        return self._of_snapshot(snapshot) if snapshot else None

    def latest(self) -> Resolution | None:
        """The newest state, None in an empty store."""
        with self._catalog.one_moment():
            tails, snapshot = self._tails.now(), self._catalog.last_snapshot()
        if snapshot is None:
            return None
        return self._tails.latest(tails, snapshot.seq) or self._of_snapshot(snapshot)

    def protected_through_ns(self) -> int:
        """Every write up to this time is in; 0 in an empty store."""
        return self._catalog.meta("protected_through_ns")

    @_again_if_replaced
    def at_time(self, time_ns: int) -> tuple[Resolution, bool]:
        """The newest reachable state not after `time_ns`, and whether it is the state at exactly that time.

        It isn't where writes that can't be told apart may lie between the two: within a granule of the interval
        that has writes, from the first write on where it has snapshots only, and inside a gap.

        Raises:
            NoSuchInstantError: before the first state, or after protected-through.
        """
        with self._catalog.one_moment():
            protected_ns, tails = self.protected_through_ns(), self._tails.now()
            snapshot = self._catalog.snapshot_at_time(time_ns)
            interval = self._interval_behind(snapshot) if snapshot is not None else None
        if snapshot is None:
            first = self._catalog.first_snapshot()
            has = f"the first state is at {first.time_ns} ns" if first else "the store is empty"
            raise NoSuchInstantError(f"{self.path}: no state at {time_ns} ns: {has}")
        if time_ns > protected_ns:
            raise NoSuchInstantError(
                f"{self.path}: {time_ns} ns is after {protected_ns} ns, through which the store is protected"
            )
        if snapshot.time_ns == time_ns:
            return self._of_snapshot(snapshot), True
        if interval is not None and time_ns >= interval.to_time_ns:
            raise self._broken_chain(snapshot)
        resolution, known = self._of_snapshot(snapshot), True
        if interval is not None and interval.granularity_ns is not None:
            journal = self._journal(interval)
            interval = journal.interval
            position = journal.position_at_time(time_ns)
            if position is not None:
                resolution = self._intermediary(interval, position)
            known = _is_known(interval, position, time_ns, journal)
        elif interval is not None:
            first_ns = interval.first_time_ns
            known = time_ns < (snapshot.time_ns + 1 if first_ns is None else first_ns)
        else:
            resolution = self._tails.at_time(tails, snapshot.seq, time_ns) or resolution
        if resolution.time_ns == time_ns:
            return resolution, True
        return resolution, known and not self._catalog.has_gap(resolution.time_ns, time_ns)

    @_again_if_replaced
    def at_seq(self, seq: int) -> Resolution:
        """The newest reachable state not after write `seq`.

        Raises:
            NoSuchInstantError: before the first state, or after the last.
        """
        with self._catalog.one_moment():
            tails, last = self._tails.now(), self._catalog.last_snapshot()
            snapshot = self._catalog.snapshot_at_seq(seq)
            interval = self._interval_behind(snapshot) if snapshot is not None else None
        if snapshot is not None and last is not None and seq > last.seq:
            found = self._tails.at_seq(tails, last.seq, seq)
            if found is not None:
                return found
        if snapshot is None or last is None or seq > last.seq:
            first = self._catalog.first_snapshot()
            end = max(last.seq, tails[-1].to_seq if tails else 0) if last else 0
            has = f"has {first.seq} to {end}" if first and last else "is empty"
            raise NoSuchInstantError(f"{self.path}: no state at seq {seq}: the store {has}")
        if seq > snapshot.seq and (interval is None or seq >= interval.to_seq):
            raise self._broken_chain(snapshot)
        if seq > snapshot.seq and interval is not None and interval.granularity_ns is not None:
            journal = self._journal(interval)
            position = journal.position_at_seq(seq)
            if position is not None:
                return self._intermediary(journal.interval, position)
        return self._of_snapshot(snapshot)

    def _interval_behind(self, snapshot: Snapshot) -> Interval | None:
        """The interval that begins at a snapshot, as of one moment; only the last may have none."""
        interval = self._catalog.interval_from(snapshot.id)
        if interval is None:
            last = self._catalog.last_snapshot()
            broken = last is not None and snapshot.id < last.id
        else:
            broken = (interval.from_seq, interval.from_time_ns) != (snapshot.seq, snapshot.time_ns)
        if broken:
            raise self._broken_chain(snapshot)
        return interval

    def _broken_chain(self, snapshot: Snapshot) -> CorruptionError:
        return CorruptionError(
            self._catalog.path, 0, f"what follows snapshot {snapshot.id} doesn't fit to it: an index is damaged"
        )

    def at_instant(self, time_ns: int) -> Resolution | None:
        """The reachable state of exactly that time, if there is one."""
        try:
            resolution, _ = self.at_time(time_ns)
        except NoSuchInstantError:
            return None
        return resolution if resolution.time_ns == time_ns else None

    # Listings, in bounded pages; from_ns is in, to_ns is out

    def snapshots(self, from_ns: int | None = None, to_ns: int | None = None) -> Iterator[Snapshot]:
        """Snapshots by time."""
        return self._catalog.snapshots(from_ns, to_ns)

    def newest_snapshots(self) -> Iterator[Snapshot]:
        """Snapshots, newest first; one look-up for each."""
        snapshot = self._catalog.last_snapshot()
        while snapshot is not None:
            yield snapshot
            snapshot = self._catalog.snapshot_at_time(snapshot.time_ns - 1)

    def intervals(self, from_ns: int | None = None, to_ns: int | None = None) -> Iterator[Interval]:
        """Intervals between two snapshots that have an instant in that time, by time."""
        return self._catalog.intervals(from_ns, to_ns)

    def open_intervals(self, from_ns: int | None = None, to_ns: int | None = None) -> Iterator[Interval]:
        """What streams in behind the last snapshot, as far as it can be read; two while one is being closed."""
        for tail in self._tails.now():
            is_within = (from_ns is None or tail.to_time_ns >= from_ns) and (to_ns is None or tail.from_time_ns < to_ns)
            if tail.runs and is_within:
                yield tail.interval

    def bookmarks(self, from_ns: int | None = None) -> Iterator[Bookmark]:
        """Bookmarks by time, then name."""
        return self._catalog.bookmarks(from_ns)

    def bookmark(self, name: str) -> Bookmark | None:
        return self._catalog.bookmark(name)

    def gaps(self, from_ns: int | None = None, to_ns: int | None = None) -> Iterator[Gap]:
        """Gaps that have an instant in that time, or end where it begins; by time."""
        return self._catalog.gaps(from_ns, to_ns)

    def last_gap(self) -> Gap | None:
        return self._catalog.last_gap()

    def days(self, from_day: int = 0) -> Iterator[int]:
        """Days since 1970-01-01 (UTC) that have a reachable instant; one look-up for each."""
        minute = self._catalog.next_minute(from_day * _MINUTES_OF_DAY)
        while minute is not None:
            day = minute // _MINUTES_OF_DAY
            yield day
            minute = self._catalog.next_minute((day + 1) * _MINUTES_OF_DAY)

    def minutes(self, day: int) -> Iterator[int]:
        """Minutes since the epoch, of that day since the epoch, that have a reachable instant."""
        return self._catalog.minutes(day * _MINUTES_OF_DAY, (day + 1) * _MINUTES_OF_DAY)

    def seconds(self, minute: int) -> Iterator[Resolution]:
        """The last reachable state in each second of that minute since the epoch that has one."""
        mask, protected_ns = self._catalog.seconds(minute), self.protected_through_ns()
        for second in range(minute * 60, minute * 60 + 60):
            if mask >> second % 60 & 1:
                resolution, _ = self.at_time(min((second + 1) * _SECOND_NS - 1, protected_ns))
                if resolution.time_ns >= second * _SECOND_NS:
                    yield resolution

    # Blocks

    @_again_if_replaced
    def leaf(self, resolution: Resolution, volume: int, leaf_index: int) -> tuple[U64Array, U64Array]:
        """Where blocks [leaf_index * 512, + 512) of a volume stand in that state (figure 8).

        The difference journal's last entry not after the state, where a block has one (it leads to the
        journal's own contents or to the fourth snapshot's), else what the third snapshot has.

        Returns:
            pointers uint64[512] (0: zeros) and checksums uint64[512], the caller's own.

        Raises:
            CorruptionError: block map or journal aren't what was written.
        """
        tails = self._tails.now()  # first: they become intervals, not the reverse
        pointers, checksums = self._third(tails, resolution.base_snapshot_id, volume, leaf_index)
        if resolution.end_snapshot_id is None:
            return pointers, checksums
        tail = _of_fourth(tails, resolution.end_snapshot_id)
        if tail is not None:
            self._tails.overlay(tail, resolution.seq, volume, leaf_index, pointers, checksums)
            return pointers, checksums
        start = leaf_index << FANOUT_BITS
        journal = self._journal_to(resolution.end_snapshot_id)
        blocks, newer, sums = journal.range(volume, start, start + FANOUT, resolution.seq)
        pointers[blocks - start] = newer
        checksums[blocks - start] = sums
        return pointers, checksums

    @_again_if_replaced
    def next_leaf(self, resolution: Resolution, volume: int, first: int) -> int | None:
        """Index of the first leaf, not before `first`, that may have other than zeros in that state.

        Takes no longer where there is nothing for TiB: whoever walks an image asks this, not each leaf.

        Raises:
            CorruptionError: as `leaf`.
        """
        tails = self._tails.now()
        base, over = self._layers(tails, resolution)
        written = (self._next_written(tails, fourth, volume, first, -1, seq) for fourth, seq in over.items())
        return _earliest(self._map(base).next_leaf(volume, first), *written)

    @_again_if_replaced
    def next_difference(self, one: Resolution, other: Resolution, volume: int, first: int) -> int | None:
        """Index of the first leaf, not before `first`, in which two states may differ.

        Block maps are compared from their roots down without what they share, so that neither the volume's size nor
        the history between the two counts; to that comes what was written in the intervals that the states lie in: up
        to them, or between the two if it is the same one.

        Raises:
            CorruptionError: as `leaf`.
        """
        tails = self._tails.now()
        (base, over), (other_base, other_over) = self._layers(tails, one), self._layers(tails, other)
        found = []
        for fourth in over.keys() | other_over.keys():
            after, through = sorted((over.get(fourth, -1), other_over.get(fourth, -1)))
            if after != through:
                found.append(self._next_written(tails, fourth, volume, first, after, through))
        if base != other_base:
            found.append(self._map(base).next_difference(self._map(other_base), volume, first))
        return _earliest(*found)

    def _layers(self, tails: Sequence[OpenInterval], resolution: Resolution) -> tuple[int, dict[int, int]]:
        """The snapshot that a state stands on, and the last seq of what lies over it, by the fourth of each."""
        over = {} if resolution.end_snapshot_id is None else {resolution.end_snapshot_id: resolution.seq}
        snapshot = resolution.base_snapshot_id
        while (tail := _of_fourth(tails, snapshot)) is not None:
            over[snapshot] = tail.to_seq
            snapshot = tail.base_snapshot_id
        return snapshot, over

    def _next_written(
        self, tails: Sequence[OpenInterval], fourth: int, volume: int, first: int, after_seq: int, through_seq: int
    ) -> int | None:
        """Index of the first leaf, not before `first`, into which these writes of an interval or tail went."""
        tail = _of_fourth(tails, fourth)
        if tail is not None:
            return self._tails.next_leaf(tail, volume, first, after_seq, through_seq)
        block = self._journal_to(fourth).next_block(volume, first << FANOUT_BITS, after_seq, through_seq)
        return None if block is None else block >> FANOUT_BITS

    def _journal_to(self, snapshot: int) -> JournalIndex:
        """The difference journal of the interval that ends at that snapshot."""
        interval = self._catalog.interval_to(snapshot)
        if interval is None:
            raise MissingObjectError(self._catalog.path, 0, f"interval {snapshot} is missing")
        return self._journal(interval)

    def _third(
        self, tails: Sequence[OpenInterval], snapshot: int, volume: int, leaf_index: int
    ) -> tuple[U64Array, U64Array]:
        """What a snapshot has, or a tail that becomes one when it is whole; the caller's own."""
        tail = _of_fourth(tails, snapshot)
        if tail is None:
            pointers, checksums = self._map(snapshot).leaf(volume, leaf_index)
            return pointers.copy(), checksums.copy()
        pointers, checksums = self._third(tails, tail.base_snapshot_id, volume, leaf_index)
        self._tails.overlay(tail, tail.to_seq, volume, leaf_index, pointers, checksums)
        return pointers, checksums

    def _map(self, snapshot: int) -> SnapshotMap:
        def read() -> SnapshotMap:
            roots = self._catalog.roots(snapshot)
            if len(roots) != len(self.volumes):
                raise CorruptionError(
                    self._catalog.path, 0, f"snapshot {snapshot} doesn't have a root for each volume"
                )
            return SnapshotMap(self._nodes, roots, self.volumes)

        return self._maps.get(snapshot, read)

    def _journal(self, interval: Interval) -> JournalIndex:
        """The interval's journal, or the finer one that took its place: that has the same states, and more."""
        while True:
            try:
                key = (interval.end_snapshot_id, interval.layer)
                return self._journals.get(key, partial(self._open_journal, interval))
            except MissingObjectError:
                now = self._catalog.interval_to(interval.end_snapshot_id)
                if now is None or now.layer <= interval.layer:
                    raise
                interval = now

    def _open_journal(self, interval: Interval) -> JournalIndex:
        name = object_file(ObjectKind.JOURNAL_INDEX, interval.end_snapshot_id, interval.layer)
        facts = self._catalog.object(name)
        if facts is None:
            raise MissingObjectError(self._catalog.path, 0, f"it lists an interval but not {name}")
        return JournalIndex(self.objects, interval, facts, self._chunks)

    def _of_snapshot(self, snapshot: Snapshot) -> Resolution:
        interval = self._catalog.interval_to(snapshot.id)
        granularity_ns = interval.granularity_ns if interval else None
        return Resolution(snapshot.seq, snapshot.time_ns, "snapshot", granularity_ns, snapshot.id, None)

    def _intermediary(self, interval: Interval, position: Position) -> Resolution:
        return Resolution(
            position.seq, position.time_ns, "intermediary",
            interval.granularity_ns, interval.base_snapshot_id, interval.end_snapshot_id,
        )  # fmt: skip


def _of_fourth(tails: Sequence[OpenInterval], snapshot: int) -> OpenInterval | None:
    """The tail that becomes the interval that ends at that snapshot, while it is one."""
    return next((tail for tail in tails if tail.end_snapshot_id == snapshot), None)


def _earliest(*found: int | None) -> int | None:
    return min((each for each in found if each is not None), default=None)


def _is_known(interval: Interval, position: Position | None, time_ns: int, journal: JournalIndex) -> bool:
    """Whether no write can lie between a position and `time_ns` behind it, in an interval with a granularity."""
    rung_ns = interval.granularity_ns
    if not rung_ns or (interval.first_time_ns is not None and time_ns < interval.first_time_ns):
        return True
    granule = time_ns // rung_ns
    # A position is the last write of its granule; a granule without one has no write.
    return (position is not None and position.time_ns // rung_ns == granule) or (
        journal.next_time(time_ns) // rung_ns > granule
    )
