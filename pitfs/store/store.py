"""The store as readers see it: its instants, what it lists, and where the blocks of an image are.

Any number of processes read while the writer goes on: what was committed never changes, and what isn't committed isn't
seen. A Store may be used from several threads; it is opened after a fork, not carried over.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

from pitfs.errors import CorruptionError, NoSuchInstantError
from pitfs.model.position import Position
from pitfs.store.blocks import Blocks
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.catalog.records import Interval, Resolution, Snapshot
from pitfs.store.index.reader import JournalIndex
from pitfs.store.objects.format import CATALOG, OBJECTS
from pitfs.store.objects.pool import ObjectPool, again_if_replaced, reading_limit
from pitfs.store.opening import read_store_info

__all__ = ["Resolution", "Store"]

_MINUTES_OF_DAY: Final = 24 * 60
_SECOND_NS: Final = 1_000_000_000


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
        self._catalog = catalog = Catalog(os.path.join(path, CATALOG))
        history = bytes.fromhex(info.history)
        self.objects = ObjectPool(
            os.path.join(path, OBJECTS), info.layout, history, reading_limit(), host_of=catalog.host_of
        )
        blocks = Blocks(catalog, self.objects, info.volumes)
        self._journals, self._open_intervals = blocks.journals, blocks.open_intervals
        # Where blocks are: see `Blocks`.
        self.leaf, self.next_leaf, self.next_difference = blocks.leaf, blocks.next_leaf, blocks.next_difference
        # What the catalog answers as it is: see `Catalog`.
        self.data_version = catalog.data_version
        self.snapshots, self.intervals = catalog.snapshots, catalog.intervals
        self.bookmarks, self.bookmark = catalog.bookmarks, catalog.bookmark
        self.gaps, self.last_gap, self.digest = catalog.gaps, catalog.last_gap, catalog.digest
        self.meta = catalog.meta

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

    # Instants

    def first(self) -> Resolution | None:
        """The oldest state, None in an empty store."""
        snapshot = self._catalog.first_snapshot()
        return self._of_snapshot(snapshot) if snapshot else None

    def latest(self) -> Resolution | None:
        """The newest state, None in an empty store."""
        with self._catalog.one_moment():
            now, snapshot = self._open_intervals.now(), self._catalog.last_snapshot()
        if snapshot is None:
            return None
        return self._open_intervals.latest(now, snapshot.seq) or self._of_snapshot(snapshot)

    def any_instant_from_ns(self) -> int:
        """From there on every instant can be given; 0 in an empty store."""
        first, gap = self._catalog.first_snapshot(), self.last_gap()
        ends_ns = [each.to_time_ns for each in self._catalog.coarse_intervals(1)] + ([gap.to_time_ns] if gap else [])
        return max(first.time_ns, *ends_ns, 0) if first else 0

    def protected_through_ns(self) -> int:
        """Every write up to this time is in; 0 in an empty store."""
        return self._catalog.meta("protected_through_ns")

    @again_if_replaced
    def at_time(self, time_ns: int) -> tuple[Resolution, bool]:
        """The newest reachable state not after `time_ns`, and whether it is the state at exactly that time.

        It isn't where the store doesn't know what was written between the two: within a granule of the interval that
        has writes, from the first write on where the interval has snapshots only, and inside a gap.

        Raises:
            NoSuchInstantError: before the first state, or after protected-through.
        """
        with self._catalog.one_moment():
            protected_ns, now = self.protected_through_ns(), self._open_intervals.now()
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
        found, is_known = None, True
        if interval is None:
            found = self._open_intervals.at_time(now, snapshot.seq, time_ns)
        elif interval.granularity_ns is None:
            first_ns = interval.first_time_ns
            is_known = time_ns < (snapshot.time_ns + 1 if first_ns is None else first_ns)
        else:
            journal = self._journals.of(interval)
            position = journal.position_at_time(time_ns)
            found = journal.interval.at(position)
            is_known = _is_known(position, time_ns, journal)
        resolution = found or self._of_snapshot(snapshot)
        if resolution.time_ns == time_ns:
            return resolution, True
        return resolution, is_known and not self._catalog.has_gap(resolution.time_ns, time_ns)

    @again_if_replaced
    def at_seq(self, seq: int) -> Resolution:
        """The newest reachable state not after write `seq`.

        Raises:
            NoSuchInstantError: before the first state, or after the last.
        """
        with self._catalog.one_moment():
            now, last = self._open_intervals.now(), self._catalog.last_snapshot()
            snapshot = self._catalog.snapshot_at_seq(seq)
            interval = self._interval_behind(snapshot) if snapshot is not None else None
        if snapshot is None or last is None or seq > last.seq:
            found = self._open_intervals.at_seq(now, last.seq, seq) if last is not None else None
            if found is not None:
                return found
            first = self._catalog.first_snapshot()
            end = max(last.seq, now[-1].to_seq if now else 0) if last else 0
            has = f"has {first.seq} to {end}" if first and last else "is empty"
            raise NoSuchInstantError(f"{self.path}: no state at seq {seq}: the store {has}")
        if seq == snapshot.seq:
            return self._of_snapshot(snapshot)
        if interval is None or seq >= interval.to_seq:
            raise self._broken_chain(snapshot)
        found = None
        if interval.granularity_ns is not None:
            journal = self._journals.of(interval)
            found = journal.interval.at(journal.position_at_seq(seq))
        return found or self._of_snapshot(snapshot)

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

    # Listings besides those of the catalog; from_ns is in, to_ns is out

    def newest_snapshots(self) -> Iterator[Snapshot]:
        """Snapshots, newest first; one look-up for each."""
        snapshot = self._catalog.last_snapshot()
        while snapshot is not None:
            yield snapshot
            snapshot = self._catalog.snapshot_at_time(snapshot.time_ns - 1)

    def open_intervals(self, from_ns: int | None = None, to_ns: int | None = None) -> Iterator[Interval]:
        """What streams in behind the last snapshot, as far as it is readable; two while one is being closed."""
        for each in self._open_intervals.now():
            is_later = to_ns is not None and each.from_time_ns >= to_ns
            if each.runs and not is_later and (from_ns is None or each.to_time_ns >= from_ns):
                yield each.interval

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

    def _of_snapshot(self, snapshot: Snapshot) -> Resolution:
        interval = self._catalog.interval_to(snapshot.id)
        granularity_ns = interval.granularity_ns if interval else None
        return Resolution(snapshot.seq, snapshot.time_ns, granularity_ns, snapshot.id, None)


def _is_known(position: Position | None, time_ns: int, journal: JournalIndex) -> bool:
    """Whether no write lies between a journal's position and `time_ns` behind it."""
    interval, granule_ns = journal.interval, journal.interval.granularity_ns
    if not granule_ns or (interval.first_time_ns is not None and time_ns < interval.first_time_ns):
        return True
    granule = time_ns // granule_ns
    # A position is the last write of its granule; a granule without one has no write.
    return (position is not None and position.time_ns // granule_ns == granule) or (
        journal.next_time(time_ns) // granule_ns > granule
    )
