"""The catalog: what a store has. SQLite in WAL mode; its commit is the only moment anything comes to be.

Readers in any number of processes go on while the one writer commits. Every listing fetches bounded pages, each by the
key it goes on from, so none holds a read transaction open or grows with the history.

What a damaged index hides, readers notice by the chain: each snapshot but the last begins an interval that ends at the
next. Rows vouch for themselves, see `store.catalog.database`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple
from itertools import islice, takewhile
from typing import Any, Final, TypeVar

import msgspec

from pitfs.errors import CorruptionError
from pitfs.model.blockmap import MapEntry
from pitfs.model.digest import Digests
from pitfs.model.transfer import Bookmark, Gap
from pitfs.store.catalog.database import FIRST_PAGE_ROWS, PAGE_ROWS, REMEDY
from pitfs.store.catalog.log import LoggedDatabase
from pitfs.store.catalog.records import Commit, Interval, OpenInterval, Snapshot, SortedRun
from pitfs.store.objects.format import ObjectName, ObjectRecord

T = TypeVar("T")

_MIN: Final = -(1 << 63)
_MAX: Final = (1 << 63) - 1
_SECOND_NS: Final = 1_000_000_000


def _made(make: Callable[..., T], row: tuple[Any, ...] | None) -> T | None:
    return None if row is None else make(*row)


class Catalog(LoggedDatabase):
    """What the store has, and what is added to it: all of a change or nothing."""

    _has_moved = False  # not known

    # What it says

    def data_version(self) -> int:
        """A number that changes when another connection commits."""
        return int(self.rows("PRAGMA data_version")[0][0])

    def next_snapshot_id(self) -> int:
        return self.meta("next_snapshot") or 1

    def snapshot(self, snapshot_id: int) -> Snapshot | None:
        return _made(Snapshot, self.row_of("snapshots", "id", snapshot_id))

    def first_snapshot(self) -> Snapshot | None:
        return _made(Snapshot, self.row("snapshots", "ORDER BY id"))

    def last_snapshot(self) -> Snapshot | None:
        return _made(Snapshot, self.row("snapshots", "ORDER BY id DESC"))

    def snapshot_at_time(self, time_ns: int) -> Snapshot | None:
        """The newest not after it."""
        return _made(Snapshot, self.row("snapshots", "WHERE time_ns <= ? ORDER BY time_ns DESC", time_ns))

    def snapshot_at_seq(self, seq: int) -> Snapshot | None:
        """The newest not after it."""
        return _made(Snapshot, self.row("snapshots", "WHERE seq <= ? ORDER BY seq DESC", seq))

    def interval_from(self, base_snapshot_id: int) -> Interval | None:
        """The interval that begins at that snapshot."""
        return _made(Interval, self.row_of("intervals", "from_snapshot", base_snapshot_id, column=1))

    def interval_to(self, end_snapshot_id: int) -> Interval | None:
        """The interval that ends at that snapshot."""
        return _made(Interval, self.row_of("intervals", "snapshot", end_snapshot_id))

    def coarse_intervals(self, limit: int) -> list[Interval]:
        """The newest intervals that aren't at every write, newest first."""
        sql = "SELECT * FROM intervals WHERE granularity_ns IS NOT 0 ORDER BY snapshot DESC LIMIT ?"
        return [Interval(*self.verified("intervals", row)) for row in self.rows(sql, (limit,))]

    def roots(self, snapshot_id: int) -> list[MapEntry]:
        """Roots of the block maps, one for each volume in order."""
        rows = self.rows("SELECT * FROM roots WHERE snapshot = ? ORDER BY volume", (snapshot_id,))
        found = [self.verified("roots", row) for row in rows]
        if [row[:2] for row in found] != [(snapshot_id, volume) for volume in range(len(found))]:
            raise CorruptionError(self.path, 0, f"roots of snapshot {snapshot_id} are missing: {REMEDY}")
        return [MapEntry(*row[2:]) for row in found]

    def object(self, name: str) -> ObjectRecord | None:
        return _made(ObjectRecord, self.row_of("objects", "name", name))

    def host_of(self, name: ObjectName) -> tuple[ObjectName, int] | None:
        """The object into whose file that one was moved, and where its byte 0 would be in there."""
        self._has_moved = self._has_moved or self.has_table("moved")
        row = self.row_of("moved", "name", name.file) if self._has_moved else None
        host = ObjectName.of_file(row[1]) if row else None
        return (host, row[2]) if row and host else None

    def unknown_objects(self, names: Sequence[str]) -> list[str]:
        """Those of these names that no object has, in order."""
        unknown: list[str] = []
        for start in range(0, len(names), PAGE_ROWS):
            page = names[start : start + PAGE_ROWS]
            places = ", ".join("?" * len(page))
            rows = self.rows(f"SELECT * FROM objects WHERE name IN ({places})", page)
            known = {self.verified("objects", row)[0] for row in rows}
            unknown += [name for name in page if name not in known]
        return unknown

    def digest(self, volume: int, time_ns: int) -> tuple[Snapshot, int] | None:
        """The newest snapshot not after it of which production took that volume's digest, and the digest."""
        sql = "WHERE volume = ? AND snapshot <= ? AND snapshot IN (SELECT id FROM snapshots) ORDER BY snapshot DESC"
        before = self.snapshot_at_time(time_ns) if self.has_table("digests") else None
        row = None if before is None else self.row("digests", sql, volume, before.id)
        snapshot = None if row is None else self.snapshot(row[0])
        return None if row is None or snapshot is None else (snapshot, row[2] << 64 | row[3])

    def bookmark(self, name: str) -> Bookmark | None:
        if not name.isascii():  # the names of files that users type may have bytes that aren't text
            return None
        return _made(Bookmark, self.row_of("bookmarks", "name", name))

    def last_gap(self) -> Gap | None:
        return _made(Gap, self.row("gaps", "ORDER BY id DESC"))

    def has_gap(self, after_ns: int, before_ns: int) -> bool:
        """Whether a gap overlaps the open stretch of time (after_ns, before_ns)."""
        gap = next(self.gaps(after_ns + 1), None)
        return gap is not None and gap.from_time_ns < before_ns  # gaps don't overlap: the first one tells

    # Listings; from_ns is in, to_ns is out, None is no limit

    def _listed(
        self, make: Callable[..., T], table: str, key_columns: str, sql: str, key: tuple[Any, ...], *bindings: Any
    ) -> Iterator[T]:
        """What `make` makes of the rows of a table, by a key.

        Args:
            key_columns: those of the key. sql: the condition, whose first bindings are the key behind which the listing
                begins or goes on, and the order.
        """
        width, page_rows = len(key), FIRST_PAGE_ROWS
        while True:
            rows = self.rows(f"SELECT {key_columns}, * FROM {table} {sql} LIMIT {page_rows}", (*key, *bindings))
            for row in rows:
                yield make(*self.verified(table, row[width:]))
            if len(rows) < page_rows:
                return
            key, page_rows = rows[-1][:width], min(2 * page_rows, PAGE_ROWS)

    def all_rows(self, table: str) -> Iterator[tuple[Any, ...]]:
        """Every row of a table, by its primary key."""
        columns = sorted((row[5], row[1], row[2]) for row in self.rows(f"PRAGMA table_info({table})") if row[5])
        names, places = ", ".join(name for _, name, _ in columns), ", ".join("?" * len(columns))
        first = tuple("" if kind == "TEXT" else _MIN for _, _, kind in columns)
        return self._listed(lambda *row: row, table, names, f"WHERE ({names}) > ({places}) ORDER BY {names}", first)

    def snapshots(self, from_ns: int | None = None, to_ns: int | None = None) -> Iterator[Snapshot]:
        sql = "WHERE time_ns > ? AND time_ns < ? ORDER BY time_ns"
        return self._listed(Snapshot, "snapshots", "time_ns", sql, (_before(from_ns),), _end(to_ns))

    def intervals(self, from_ns: int | None = None, to_ns: int | None = None) -> Iterator[Interval]:
        """Those that have an instant in the stretch of time."""
        sql, end_ns = "WHERE to_time_ns > ? ORDER BY to_time_ns", _end(to_ns)
        found = self._listed(Interval, "intervals", "to_time_ns", sql, (_before(from_ns),))
        return takewhile(lambda interval: interval.from_time_ns < end_ns, found)

    def bookmarks(self, from_ns: int | None = None) -> Iterator[Bookmark]:
        """By time, then name."""
        sql = "WHERE (time_ns, name) > (?, ?) ORDER BY time_ns, name"
        first = _MIN if from_ns is None else from_ns, ""  # all names come after ""
        return self._listed(Bookmark, "bookmarks", "time_ns, name", sql, first)

    def gaps(self, from_ns: int | None = None, to_ns: int | None = None) -> Iterator[Gap]:
        """Those that have an instant in the stretch of time, or end where it begins; by time."""
        first_ns, end_ns = _MIN if from_ns is None else from_ns, _end(to_ns)
        # Nothing else tells of a gap that its index doesn't find. So the index only says where to begin, and the rows
        # are read by their ids, which ascend with time; the one before the first must be an earlier one.
        found = self.rows("SELECT id FROM gaps WHERE to_time_ns >= ? ORDER BY to_time_ns, id LIMIT 1", (first_ns,))
        ((first,),) = found or self.rows("SELECT ifnull(max(id), 0) + 1 FROM gaps")
        before = _made(Gap, self.row("gaps", "WHERE id = ?", first - 1))
        if before is not None and before.to_time_ns >= first_ns:
            raise CorruptionError(self.path, 0, f"the index of gaps is damaged: {REMEDY}")
        gaps = self._listed(Gap, "gaps", "id", "WHERE id > ? ORDER BY id", (first - 1,))
        return takewhile(lambda gap: gap.from_time_ns < end_ns, gaps)  # gaps don't overlap: no later one begins before

    def minutes(self, first: int, end: int) -> Iterator[int]:
        """Minutes since the epoch in [first, end) that have a reachable instant."""
        sql = "WHERE minute > ? AND minute < ? ORDER BY minute"
        return self._listed(lambda minute, _: minute, "minutes", "minute", sql, (first - 1,), end)

    def next_minute(self, first: int) -> int | None:
        row = self.row("minutes", "WHERE minute >= ? ORDER BY minute", first)
        return row[0] if row else None

    def seconds(self, minute: int) -> int:
        """Bit i: second i of that minute has a reachable instant."""
        row = self.row_of("minutes", "minute", minute)
        return row[1] if row else 0

    # The open interval, and the one before it while that is being closed

    def open_intervals(self) -> tuple[OpenInterval, ...]:
        """Both with their sorted runs, as of one moment, oldest first."""
        with self.one_moment():
            run_rows = self.rows("SELECT * FROM pieces ORDER BY tail, first_seq")
            runs = [SortedRun(*self.verified("pieces", row)) for row in run_rows]
            rows = [self.verified("tails", row) for row in self.rows("SELECT * FROM tails ORDER BY id")]
        of_each = [tuple(run for run in runs if run.open_interval_id == row[0]) for row in rows]
        return tuple(OpenInterval(*(*row, its_runs)) for row, its_runs in zip(rows, of_each, strict=True))

    def put_open_interval(
        self, interval: OpenInterval, minutes: Mapping[int, int], protected_through_ns: int, durable: bool,
        digests: Digests = msgspec.UNSET,
    ) -> None:  # fmt: skip
        """Adds an open interval, or takes it in the place of the one that was there, with the runs that it has now.

        Args:
            digests: of the volumes at the snapshot to come.
        """
        with self.changes(durable):
            self._raise_meta("next_snapshot", interval.end_snapshot_id + 1)
            self._delete_open_interval(interval.id)
            *values, runs = astuple(interval)
            self.put("tails", values)
            for run in runs:
                self.put("pieces", run)
            self._put_minutes(minutes)
            self._raise_meta("protected_through_ns", protected_through_ns)
            self._put_digests(interval.end_snapshot_id, digests)

    def protect_through(self, time_ns: int) -> None:
        """Every write up to then is in; not durable."""
        with self.changes(durable=False):
            self._raise_meta("protected_through_ns", time_ns)

    def drop_open_interval(self, open_interval_id: int) -> None:
        """Of an open interval without writes."""
        with self.changes():
            self._delete_open_interval(open_interval_id)

    def _delete_open_interval(self, open_interval_id: int) -> None:
        self.delete("tails", "id", open_interval_id)
        self.delete("pieces", "tail", open_interval_id)

    # What is added

    def commit(self, commit: Commit) -> None:
        """Adds all of it or nothing; durable when it returns."""
        manifest, snapshot = commit.manifest, commit.snapshot
        with self.changes():
            if manifest.mark > self.meta("mark"):  # else a stream was closed behind it
                self._raise_meta("mark_seq", manifest.to_seq)
            self._raise_meta("mark", manifest.mark)
            self._raise_meta("protected_through_ns", manifest.protected_through_ns)
            last = snapshot or self.last_snapshot()
            if last is not None and last.seq == manifest.to_seq:  # also of one that came before, without digests
                self._put_digests(last.id, manifest.digests)
            if snapshot is not None:
                self._raise_meta("next_snapshot", snapshot.id + 1)
                self.put("snapshots", astuple(snapshot))
                for volume, root in enumerate(commit.roots):
                    self.put("roots", (snapshot.id, volume, root.pointer, root.checksum))
                if commit.interval is not None:
                    self.put("intervals", astuple(commit.interval))
                for record in commit.objects:
                    self.put("objects", astuple(record))
            for bookmark in manifest.bookmarks:  # one that is there stays: nothing is ever rewritten
                self.put("bookmarks", msgspec.structs.astuple(bookmark), "ON CONFLICT DO NOTHING")
            for gap in manifest.gaps:
                self.put("gaps", (None, *msgspec.structs.astuple(gap)))
            self._put_minutes(commit.minutes)
            if commit.open_interval_id is not None:
                self._delete_open_interval(commit.open_interval_id)

    def commit_layers(
        self, interval: Interval, objects: Sequence[ObjectRecord], replaced: str, minutes: Mapping[int, int]
    ) -> None:
        """Makes an interval finer, or nothing; durable when it returns.

        Args:
            interval: as it is then.
            objects: new ones, and those that have grown. replaced: name of the index whose place they take, or "".
        """
        with self.changes():
            for name in (replaced, *(record.name for record in objects)):
                self.delete("objects", "name", name)
            for record in objects:
                self.put("objects", _values(record))
            self.put_interval(interval)
            self._put_minutes(minutes)

    def put_interval(self, interval: Interval) -> None:
        """Takes it in the place of the one that ends at the same snapshot; within `changes`."""
        self.delete("intervals", "snapshot", interval.end_snapshot_id)
        self.put("intervals", _values(interval))

    def clear_seconds(self, after_ns: int, before_ns: int) -> None:
        """No second between those of these two times has a reachable instant any more; within `changes`."""
        first, end = after_ns // _SECOND_NS + 1, before_ns // _SECOND_NS
        self.rows("DELETE FROM minutes WHERE minute > ? AND minute < ?", (first // 60, end // 60))
        for minute in {first // 60, end // 60} if first < end else ():
            gone = (1 << min(end - minute * 60, 60)) - (1 << max(first - minute * 60, 0))
            bits = self.seconds(minute)
            if bits & gone:
                self.delete("minutes", "minute", minute)
                if bits & ~gone:
                    self.put("minutes", (minute, bits & ~gone))

    def removals(self) -> list[tuple[int, int]]:
        """(before_id, after_id) of what was removed, or thinned, and may still take room."""
        rows = self.rows("SELECT * FROM removals ORDER BY before_id") if self.has_table("removals") else []
        return [(row[0], row[1]) for row in (self.verified("removals", each) for each in rows)]

    def fence(self, epoch: int, instance: int) -> None:
        """From here on senders of an earlier epoch, or of the same and another instance, are refused."""
        if (self.meta("epoch"), self.meta("instance")) != (epoch, instance):
            with self.changes():
                self._put_meta("epoch", epoch)
                self._put_meta("instance", instance)

    def remember(self, **values: int) -> None:
        """Sets numbers of `meta`."""
        with self.changes():
            for key, value in values.items():
                self._put_meta(key, value)

    def expire_bookmarks(self, before_ns: int) -> None:
        """Forgets those of positions before that time."""
        while page := [each.name for each in islice(self.bookmarks(), PAGE_ROWS) if each.time_ns < before_ns]:
            with self.changes():
                for name in page:
                    self.delete("bookmarks", "name", name)

    def write_over(self) -> None:
        """Commits a number that means nothing.

        SQLite's log may have a commit that failed, and a power loss would bring it back. After this it won't: the log
        has been written over.
        """
        with self.changes():
            self._put_meta("written_over", self.meta("written_over") + 1)

    def _raise_meta(self, key: str, value: int) -> None:
        """Sets a number that never goes back."""
        if value > self.meta(key):
            self._put_meta(key, value)

    def _put_digests(self, snapshot_id: int, digests: Digests) -> None:
        """Keeps the digests of the volumes at a snapshot; those that are there stay."""
        halves = iter(struct.unpack(f">{len(digests) // 8}Q", digests) if digests else ())
        for volume, (high, low) in enumerate(zip(halves, halves, strict=True)):
            self.put("digests", (snapshot_id, volume, high, low), "ON CONFLICT DO NOTHING")

    def _put_minutes(self, minutes: Mapping[int, int]) -> None:
        for minute, bits in minutes.items():
            row = minute, bits | self.seconds(minute)
            self.put("minutes", row, "ON CONFLICT DO UPDATE SET seconds = ?2, row_checksum = ?3")


def _values(record: ObjectRecord | Interval) -> tuple[Any, ...]:
    """As `astuple`, in a tenth of the time: for rows by the thousand."""
    return tuple(getattr(record, name) for name in record.__slots__)


def _before(from_ns: int | None) -> int:
    """Key just before `from_ns`."""
    return _MIN if from_ns is None else max(from_ns - 1, _MIN)


def _end(to_ns: int | None) -> int:
    return _MAX if to_ns is None else min(to_ns, _MAX)
