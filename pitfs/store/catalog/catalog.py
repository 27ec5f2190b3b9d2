"""The catalog: what a store has. SQLite in WAL mode; its commit is the only moment anything comes to be.

Readers in any number of processes go on while the one writer commits. Every listing fetches bounded pages,
each by the key it goes on from, so none holds a read transaction open or grows with the history.

What a damaged index hides, readers notice by the chain: each snapshot but the last begins an interval that ends at
the next. Rows vouch for themselves, see `store.database`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, replace
from typing import Any, Final

from pitfs.errors import CorruptionError
from pitfs.model.blockmap import MapEntry
from pitfs.model.transfer import Bookmark, Gap
from pitfs.store.catalog.database import FIRST_PAGE_ROWS, PAGE_ROWS, REMEDY, Database, to_signed, to_unsigned
from pitfs.store.catalog.records import Commit, Interval, LayersCommit, OpenInterval, Snapshot, SortedRun
from pitfs.store.objects.format import ObjectRecord


def _bookmark(row: tuple[Any, ...]) -> Bookmark:
    return Bookmark(name=row[0], seq=row[1], time_ns=row[2])

_GAP: Final = "from_seq, from_time_ns, to_seq, to_time_ns, cause, row_checksum"  # all columns but the id


class Catalog(Database):
    """What the store has, and what is added to it: all of a change or nothing."""

    # What it says

    def data_version(self) -> int:
        """A number that changes when another connection commits."""
        return int(self._rows("PRAGMA data_version")[0][0])

    def meta(self, key: str) -> int:
        """`mark`, `mark_seq`, `protected_through_ns`, `next_snapshot`, `epoch`, `instance`; 0: nothing yet."""
        row = self._row_of("meta", 0, "key", key)
        return int(row[1]) if row else 0

    def next_snapshot_id(self) -> int:
        return self.meta("next_snapshot") or 1

    def snapshot(self, snapshot: int) -> Snapshot | None:
        row = self._row_of("snapshots", 0, "id", snapshot)
        return Snapshot(*row) if row else None

    def first_snapshot(self) -> Snapshot | None:
        row = self._row("snapshots", "ORDER BY id")
        return Snapshot(*row) if row else None

    def last_snapshot(self) -> Snapshot | None:
        row = self._row("snapshots", "ORDER BY id DESC")
        return Snapshot(*row) if row else None

    def snapshot_at_time(self, time_ns: int) -> Snapshot | None:
        """The newest not after it."""
        row = self._row("snapshots", "WHERE time_ns <= ? ORDER BY time_ns DESC", time_ns)
        return Snapshot(*row) if row else None

    def snapshot_at_seq(self, seq: int) -> Snapshot | None:
        """The newest not after it."""
        row = self._row("snapshots", "WHERE seq <= ? ORDER BY seq DESC", seq)
        return Snapshot(*row) if row else None

    def interval_from(self, snapshot: int) -> Interval | None:
        """The interval that begins at that snapshot."""
        row = self._row_of("intervals", 1, "from_snapshot", snapshot)
        return Interval(*row) if row else None

    def interval_to(self, snapshot: int) -> Interval | None:
        """The interval that ends at that snapshot."""
        row = self._row_of("intervals", 0, "snapshot", snapshot)
        return Interval(*row) if row else None

    def coarse_intervals(self, limit: int) -> list[Interval]:
        """The newest intervals that aren't at every write, newest first."""
        sql = "SELECT * FROM intervals WHERE granularity_ns IS NOT 0 ORDER BY snapshot DESC LIMIT ?"
        return [Interval(*self._verified("intervals", row)) for row in self._rows(sql, (limit,))]

    def roots(self, snapshot: int) -> list[MapEntry]:
        """Roots of the block maps, one for each volume in order."""
        rows = self._rows("SELECT * FROM roots WHERE snapshot = ? ORDER BY volume", (snapshot,))
        found = [self._verified("roots", row) for row in rows]
        if [row[:2] for row in found] != [(snapshot, volume) for volume in range(len(found))]:
            raise CorruptionError(self.path, 0, f"roots of snapshot {snapshot} are missing: {REMEDY}")
        return [MapEntry(to_unsigned(pointer), to_unsigned(checksum)) for _, _, pointer, checksum in found]

    def object(self, name: str) -> ObjectRecord | None:
        row = self._row_of("objects", 0, "name", name)
        if row is None:
            return None
        _, kind, snapshot, data_bytes, tail_bytes, checksum = row
        return ObjectRecord(name, kind, snapshot, data_bytes, tail_bytes, to_unsigned(checksum))

    def unknown_objects(self, names: Sequence[str]) -> list[str]:
        """Those of these names that no object has, in order."""
        unknown: list[str] = []
        for start in range(0, len(names), PAGE_ROWS):
            page = names[start : start + PAGE_ROWS]
            places = ", ".join("?" * len(page))
            known = {name for (name,) in self._rows(f"SELECT name FROM objects WHERE name IN ({places})", page)}
            unknown += [name for name in page if name not in known]
        return unknown

    def bookmark(self, name: str) -> Bookmark | None:
        if not name.isascii():  # the names of files that users type may have bytes that aren't text
            return None
        row = self._row_of("bookmarks", 0, "name", name)
        return _bookmark(row) if row else None

    def last_gap(self) -> Gap | None:
        sql = f"SELECT {_GAP} FROM gaps ORDER BY to_time_ns DESC, id DESC LIMIT 1"
        return next((Gap(*self._verified("gaps", row)) for row in self._rows(sql)), None)

    def has_gap(self, after_ns: int, before_ns: int) -> bool:
        """Whether a gap overlaps the open stretch of time (after_ns, before_ns)."""
        sql = "SELECT from_time_ns FROM gaps WHERE to_time_ns > ? ORDER BY to_time_ns LIMIT 1"  # they don't overlap
        return any(from_ns < before_ns for (from_ns,) in self._rows(sql, (after_ns,)))

    # Listings; from_ns is in, to_ns is out, None is no limit

    def _paged(
        self, table: str, columns: str, sql: str, bindings: Sequence[Any], key: tuple[Any, ...]
    ) -> Iterator[tuple[Any, ...]]:
        """Rows of a table, verified: the first bindings of `sql` are the key to go on from.

        Args:
            columns: as many as the key has, whose values in a row are the key behind it; then the row's own.
        """
        width, page_rows = len(key), FIRST_PAGE_ROWS
        while True:
            rows = self._rows(f"SELECT {columns} FROM {table} {sql} LIMIT {page_rows}", (*key, *bindings))
            for row in rows:
                yield self._verified(table, row[width:])
            if len(rows) < page_rows:
                return
            key, page_rows = rows[-1][:width], min(2 * page_rows, PAGE_ROWS)

    def snapshots(self, from_ns: int | None, to_ns: int | None) -> Iterator[Snapshot]:
        sql = "WHERE time_ns > ? AND time_ns < ? ORDER BY time_ns"
        for row in self._paged("snapshots", "time_ns, *", sql, (_high(to_ns),), (_low(from_ns),)):
            yield Snapshot(*row)

    def intervals(self, from_ns: int | None, to_ns: int | None) -> Iterator[Interval]:
        """Those that have an instant in the stretch of time."""
        sql = "WHERE to_time_ns > ? ORDER BY to_time_ns"
        for row in self._paged("intervals", "to_time_ns, *", sql, (), (_low(from_ns),)):
            interval = Interval(*row)
            if interval.from_time_ns >= _high(to_ns):  # so do all later ones
                return
            yield interval

    def bookmarks(self, from_ns: int | None = None) -> Iterator[Bookmark]:
        """By time, then name."""
        sql = "WHERE (time_ns, name) > (?, ?) ORDER BY time_ns, name"
        first = _low(None) if from_ns is None else from_ns  # all names come after ""
        for row in self._paged("bookmarks", "time_ns, name, *", sql, (), (first, "")):
            yield _bookmark(row)

    def gaps(self, from_ns: int | None = None, to_ns: int | None = None) -> Iterator[Gap]:
        """Those that have an instant in the stretch of time, or end where it begins; by time."""
        columns = f"to_time_ns, id, {_GAP}"
        sql = "WHERE (to_time_ns, id) > (?, ?) ORDER BY to_time_ns, id"
        for row in self._paged("gaps", columns, sql, (), (_low(None) if from_ns is None else from_ns, 0)):
            gap = Gap(*row)
            if gap.from_time_ns >= _high(to_ns):  # gaps don't overlap: no later one begins before it
                return
            yield gap

    def minutes(self, first: int, end: int) -> Iterator[int]:
        """Minutes since the epoch in [first, end) that have a reachable instant."""
        sql = "WHERE minute > ? AND minute < ? ORDER BY minute"
        for minute, _ in self._paged("minutes", "minute, *", sql, (end,), (first - 1,)):
            yield minute

    def next_minute(self, first: int) -> int | None:
        row = self._row("minutes", "WHERE minute >= ? ORDER BY minute", first)
        return row[0] if row else None

    def seconds(self, minute: int) -> int:
        """Bit i: second i of that minute has a reachable instant."""
        row = self._row_of("minutes", 0, "minute", minute)
        return row[1] if row else 0

    # Tails: the open interval, and the one before it while that is being closed

    def open_intervals(self) -> tuple[OpenInterval, ...]:
        """All of them with their pieces, as of one moment, oldest first."""
        with self.one_moment():
            pieces: dict[int, list[SortedRun]] = {}
            for row in self._rows("SELECT * FROM pieces ORDER BY tail, first_seq"):
                *values, checksum = self._verified("pieces", row)
                pieces.setdefault(values[0], []).append(SortedRun(*(*values, to_unsigned(checksum))))
            rows = [self._verified("tails", row) for row in self._rows("SELECT * FROM tails ORDER BY id")]
        return tuple(OpenInterval(*(*row, tuple(pieces.get(row[0], ())))) for row in rows)

    def put_open_interval(
        self, tail: OpenInterval, minutes: Mapping[int, int], protected_through_ns: int, durable: bool
    ) -> None:
        """Adds a tail, or takes it in the place of the one that was there, with the pieces that it has now."""
        with self._changes(durable):
            if tail.end_snapshot_id >= self.next_snapshot_id():
                self._put_meta("next_snapshot", tail.end_snapshot_id + 1)
            there = self._delete_tail(tail.id, but=tail.runs)
            *facts, _ = astuple(replace(tail, runs=()))
            self._put("tails", facts)
            for piece in tail.runs:
                if (piece.first_seq, piece.to_seq) not in there:
                    *values, checksum = astuple(piece)
                    self._put("pieces", (*values, to_signed(checksum)))
            self._put_minutes(minutes)
            self._put_protected(protected_through_ns)

    def protect_through(self, time_ns: int) -> None:
        """Every write up to then is in; not durable."""
        with self._changes(durable=False):
            self._put_protected(time_ns)

    def drop_open_interval(self, tail: int) -> None:
        """Of a tail without writes."""
        with self._changes():
            self._delete_tail(tail)

    def _delete_tail(self, tail: int, but: Sequence[SortedRun] = ()) -> set[tuple[int, int]]:
        """Returns (first_seq, to_seq) of the pieces that it has still."""
        self._db.execute("DELETE FROM tails WHERE id = ?", (tail,))
        there = {(row[0], row[1]) for row in self._rows("SELECT first_seq, to_seq FROM pieces WHERE tail = ?", (tail,))}
        gone = there - {(piece.first_seq, piece.to_seq) for piece in but}
        for first_seq, _ in gone:
            self._db.execute("DELETE FROM pieces WHERE tail = ? AND first_seq = ?", (tail, first_seq))
        return there - gone

    def _put_protected(self, time_ns: int) -> None:
        if time_ns > self.meta("protected_through_ns"):  # it never goes back
            self._put_meta("protected_through_ns", time_ns)

    # What is added

    def commit(self, commit: Commit) -> None:
        """Adds all of it or nothing; durable when it returns."""
        manifest = commit.manifest
        numbers = {"mark": manifest.mark, "protected_through_ns": manifest.protected_through_ns}
        if commit.snapshot is not None:
            numbers["next_snapshot"] = commit.snapshot.id + 1
        with self._changes():
            if manifest.mark > self.meta("mark"):  # else a stream was closed behind it
                numbers["mark_seq"] = manifest.to_seq
            if commit.snapshot is not None:
                self._insert_snapshot(commit, commit.snapshot)
            for b in manifest.bookmarks:  # one that is there stays: nothing is ever rewritten
                self._put("bookmarks", (b.name, b.seq, b.time_ns), "ON CONFLICT DO NOTHING")
            for gap in manifest.gaps:
                self._put(
                    f"gaps ({_GAP})",
                    (gap.from_seq, gap.from_time_ns, gap.to_seq, gap.to_time_ns, gap.cause),
                )
            self._put_minutes(commit.minutes)
            for key, value in numbers.items():
                self._put_meta(key, max(value, self.meta(key)))  # they never go back
            if commit.open_interval_id is not None:
                self._delete_tail(commit.open_interval_id)

    def commit_layers(self, commit: LayersCommit) -> None:
        """Makes an interval finer, or nothing; durable when it returns."""
        with self._changes():
            if commit.replaced is not None:
                self._db.execute("DELETE FROM objects WHERE name = ?", (commit.replaced,))
            for item in commit.objects:
                self._db.execute("DELETE FROM objects WHERE name = ?", (item.name,))
                self._put_object(item)
            self._db.execute("DELETE FROM intervals WHERE snapshot = ?", (commit.base.end_snapshot_id,))
            self._put("intervals", astuple(commit.interval))
            self._put_minutes(commit.minutes)

    def fence(self, epoch: int, instance: int) -> None:
        """From here on senders of an earlier epoch, or of the same and another instance, are refused."""
        if (self.meta("epoch"), self.meta("instance")) == (epoch, instance):
            return
        with self._changes():
            self._put_meta("epoch", epoch)
            self._put_meta("instance", instance)

    def write_over(self) -> None:
        """Commits a number that means nothing.

        A commit that failed may stand in the log all the same, and a power loss would bring it back. After
        this it can't: the log has been written over.
        """
        with self._changes():
            self._put_meta("written_over", self.meta("written_over") + 1)

    def _put_meta(self, key: str, value: int) -> None:
        self._put("meta", (key, value), "ON CONFLICT DO UPDATE SET value = ?2, row_checksum = ?3")

    def _insert_snapshot(self, commit: Commit, snapshot: Snapshot) -> None:
        self._put("snapshots", (snapshot.id, snapshot.seq, snapshot.time_ns, snapshot.mark))
        for i, root in enumerate(commit.roots):
            self._put("roots", (snapshot.id, i, to_signed(root.pointer), to_signed(root.checksum)))
        if commit.interval is not None:
            self._put("intervals", astuple(commit.interval))
        for item in commit.objects:
            self._put_object(item)

    def _put_object(self, item: ObjectRecord) -> None:
        facts = (item.name, item.kind, item.snapshot_id, item.data_bytes, item.footer_bytes)
        self._put("objects", (*facts, to_signed(item.footer_checksum)))

    def _put_minutes(self, minutes: Mapping[int, int]) -> None:
        for minute, bits in minutes.items():
            row = minute, bits | self.seconds(minute)
            self._put("minutes", row, "ON CONFLICT DO UPDATE SET seconds = ?2, row_checksum = ?3")


def _low(from_ns: int | None) -> int:
    """Key just before `from_ns`."""
    return -(1 << 63) if from_ns is None else max(from_ns - 1, -(1 << 63))


def _high(to_ns: int | None) -> int:
    return (1 << 63) - 1 if to_ns is None else min(to_ns, (1 << 63) - 1)
