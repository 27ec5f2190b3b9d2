"""The catalog: what a store has. SQLite in WAL mode; its commit is the only moment anything comes to be.

Readers in any number of processes go on while the one writer commits. Every listing fetches bounded pages,
each by the key it goes on from, so none holds a read transaction open or grows with the history.

SQLite integers are signed: unsigned 64-bit pointers and checksums are stored as the signed number with the
same bits.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import apsw

from pitfs.errors import CapacityError, CorruptionError, PitfsError, StoreError, StoreVersionError
from pitfs.model.blockmap import Entry
from pitfs.model.transfer import Bookmark, Gap
from pitfs.store.facts import Commit, Interval, ObjectFacts, Snapshot

CATALOG_VERSION: Final = 1
PAGE_ROWS: Final = 512  # rows that a listing holds at once
BUSY_MS: Final = 10_000  # a commit or a checkpoint of another process takes far less

_SCHEMA: Final = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE snapshots (
    id INTEGER PRIMARY KEY, seq INTEGER NOT NULL UNIQUE, time_ns INTEGER NOT NULL UNIQUE,
    mark INTEGER NOT NULL
) STRICT;
CREATE TABLE roots (
    snapshot INTEGER NOT NULL, volume INTEGER NOT NULL, pointer INTEGER NOT NULL, checksum INTEGER NOT NULL,
    PRIMARY KEY (snapshot, volume)
) STRICT, WITHOUT ROWID;
CREATE TABLE intervals (  -- snapshot is the one at its end
    snapshot INTEGER PRIMARY KEY, from_snapshot INTEGER NOT NULL UNIQUE,
    from_seq INTEGER NOT NULL, from_time_ns INTEGER NOT NULL UNIQUE,
    to_seq INTEGER NOT NULL, to_time_ns INTEGER NOT NULL UNIQUE,
    first_time_ns INTEGER, granularity_ns INTEGER, cause TEXT NOT NULL, journal_rows INTEGER NOT NULL
) STRICT;
CREATE TABLE objects (
    name TEXT PRIMARY KEY, kind INTEGER NOT NULL, snapshot INTEGER NOT NULL,
    data_bytes INTEGER NOT NULL, tail_bytes INTEGER NOT NULL, tail_checksum INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE bookmarks (
    name TEXT PRIMARY KEY, seq INTEGER NOT NULL, time_ns INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX bookmarks_by_time ON bookmarks (time_ns, name);
CREATE TABLE gaps (
    id INTEGER PRIMARY KEY, from_seq INTEGER NOT NULL, from_time_ns INTEGER NOT NULL,
    to_seq INTEGER NOT NULL, to_time_ns INTEGER NOT NULL, cause TEXT NOT NULL
) STRICT;
CREATE INDEX gaps_by_time ON gaps (to_time_ns, id);
CREATE TABLE minutes (  -- bit i of seconds: second i of that minute since the epoch has a reachable instant
    minute INTEGER PRIMARY KEY, seconds INTEGER NOT NULL
) STRICT;
"""


def to_signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def to_unsigned(value: int) -> int:
    return value & ((1 << 64) - 1)


def _bookmark(row: tuple[Any, ...]) -> Bookmark:
    return Bookmark(name=row[0], seq=row[1], time_ns=row[2])


@contextmanager
def _errors(path: str) -> Iterator[None]:
    """SQLite's errors in our words."""
    try:
        yield
    except apsw.FullError:
        raise CapacityError(
            f"{path}: no room: make room on that file system; pitfs goes on by itself"
        ) from None
    except (apsw.CorruptError, apsw.NotADBError) as error:
        raise CorruptionError(
            path, 0, f"{error}: put a copy of it back, or move the store away for a new full copy"
        ) from None
    except apsw.CantOpenError:
        raise StoreError(f"{path}: can't be opened: is it there, and may this user read it?") from None
    except apsw.Error as error:
        raise PitfsError(f"{path}: {error}") from error


class Catalog:
    """One connection to a store's catalog; may be used from several threads, but not across fork.

    Args:
        path: catalog.sqlite.
        mode: "read", "write" (made if it isn't there).

    Raises:
        StoreError, StoreVersionError, CorruptionError, CapacityError, PitfsError: also from every method.
    """

    def __init__(self, path: str, mode: str = "read") -> None:
        self.path = path
        self._lock = threading.Lock()
        with _errors(path):
            self._db = self._connect(mode)
        try:
            with _errors(path):
                self._prepare(mode)
        except BaseException:
            self._db.close()
            raise

    def _connect(self, mode: str) -> apsw.Connection:
        if mode == "write":
            return apsw.Connection(self.path, flags=apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE)
        writable = os.access(self.path, os.W_OK)  # a reader needs the -shm file; read-only where it can't
        return apsw.Connection(
            self.path, flags=apsw.SQLITE_OPEN_READWRITE if writable else apsw.SQLITE_OPEN_READONLY
        )

    def _prepare(self, mode: str) -> None:
        self._db.set_busy_timeout(BUSY_MS)
        (version,) = self._rows("PRAGMA user_version")[0]
        if version > CATALOG_VERSION:
            raise StoreVersionError(
                f"{self.path}: catalog of version {version}, this pitfs knows up to {CATALOG_VERSION}: "
                f"use a newer pitfs"
            )
        if mode == "write":
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            if version == 0:
                with self._db:
                    self._db.execute(_SCHEMA)
                    self._db.execute(f"PRAGMA user_version = {CATALOG_VERSION}")
        elif version == 0:
            raise StoreError(
                f"{self.path}: no catalog of a store: put a copy of it back, or move the store away for a new full copy"
            )
        else:
            self._db.execute("PRAGMA query_only = 1")

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def _rows(self, sql: str, bindings: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self._lock, _errors(self.path):
            return list(self._db.execute(sql, tuple(bindings)))

    def _row(self, sql: str, *bindings: Any) -> tuple[Any, ...] | None:
        rows = self._rows(sql, bindings)
        return rows[0] if rows else None

    # What it says

    def data_version(self) -> int:
        """A number that changes when another connection commits."""
        return int(self._rows("PRAGMA data_version")[0][0])

    def meta(self, key: str) -> int:
        """`mark`, `protected_through_ns`, `next_snapshot`; 0 where there is nothing yet."""
        row = self._row("SELECT value FROM meta WHERE key = ?", key)
        return int(row[0]) if row else 0

    def next_snapshot_id(self) -> int:
        return self.meta("next_snapshot") or 1

    def snapshot(self, snapshot: int) -> Snapshot | None:
        row = self._row("SELECT id, seq, time_ns, mark FROM snapshots WHERE id = ?", snapshot)
        return Snapshot(*row) if row else None

    def first_snapshot(self) -> Snapshot | None:
        row = self._row("SELECT id, seq, time_ns, mark FROM snapshots ORDER BY seq LIMIT 1")
        return Snapshot(*row) if row else None

    def last_snapshot(self) -> Snapshot | None:
        row = self._row("SELECT id, seq, time_ns, mark FROM snapshots ORDER BY seq DESC LIMIT 1")
        return Snapshot(*row) if row else None

    def snapshot_at_time(self, time_ns: int) -> Snapshot | None:
        """The newest not after it."""
        sql = "SELECT id, seq, time_ns, mark FROM snapshots WHERE time_ns <= ? ORDER BY time_ns DESC LIMIT 1"
        row = self._row(sql, time_ns)
        return Snapshot(*row) if row else None

    def snapshot_at_seq(self, seq: int) -> Snapshot | None:
        """The newest not after it."""
        sql = "SELECT id, seq, time_ns, mark FROM snapshots WHERE seq <= ? ORDER BY seq DESC LIMIT 1"
        row = self._row(sql, seq)
        return Snapshot(*row) if row else None

    def interval_from(self, snapshot: int) -> Interval | None:
        """The interval that begins at that snapshot."""
        row = self._row("SELECT * FROM intervals WHERE from_snapshot = ?", snapshot)
        return Interval(*row) if row else None

    def interval_to(self, snapshot: int) -> Interval | None:
        """The interval that ends at that snapshot."""
        row = self._row("SELECT * FROM intervals WHERE snapshot = ?", snapshot)
        return Interval(*row) if row else None

    def roots(self, snapshot: int) -> list[Entry]:
        """Roots of the block maps, one for each volume in order."""
        rows = self._rows(
            "SELECT pointer, checksum FROM roots WHERE snapshot = ? ORDER BY volume", (snapshot,)
        )
        return [Entry(to_unsigned(pointer), to_unsigned(checksum)) for pointer, checksum in rows]

    def object(self, name: str) -> ObjectFacts | None:
        row = self._row("SELECT * FROM objects WHERE name = ?", name)
        if row is None:
            return None
        name, kind, snapshot, data_bytes, tail_bytes, checksum = row
        return ObjectFacts(name, kind, snapshot, data_bytes, tail_bytes, to_unsigned(checksum))

    def bookmark(self, name: str) -> Bookmark | None:
        row = self._row("SELECT name, seq, time_ns FROM bookmarks WHERE name = ?", name)
        return _bookmark(row) if row else None

    def has_gap(self, after_ns: int, before_ns: int) -> bool:
        """Whether a gap overlaps the open stretch of time (after_ns, before_ns)."""
        sql = "SELECT 1 FROM gaps WHERE to_time_ns > ? AND from_time_ns < ? LIMIT 1"
        return self._row(sql, after_ns, before_ns) is not None

    # Listings; from_ns is in, to_ns is out, None is no limit

    def _paged(
        self, sql: str, bindings: Sequence[Any], key: tuple[Any, ...], width: int
    ) -> Iterator[tuple[Any, ...]]:
        """Rows of `sql`: its first bindings are the key to go on from, its first columns that key."""
        while True:
            rows = self._rows(f"{sql} LIMIT {PAGE_ROWS}", (*key, *bindings))
            for row in rows:
                yield row[width:]
            if len(rows) < PAGE_ROWS:
                return
            key = rows[-1][:width]

    def snapshots(self, from_ns: int | None, to_ns: int | None) -> Iterator[Snapshot]:
        sql = (
            "SELECT time_ns, id, seq, time_ns, mark FROM snapshots"
            " WHERE time_ns > ? AND time_ns < ? ORDER BY time_ns"
        )
        for row in self._paged(sql, (_high(to_ns),), (_low(from_ns),), 1):
            yield Snapshot(*row)

    def intervals(self, from_ns: int | None, to_ns: int | None) -> Iterator[Interval]:
        """Those that have an instant in the stretch of time."""
        sql = (
            "SELECT to_time_ns, intervals.* FROM intervals"
            " WHERE to_time_ns > ? AND from_time_ns < ? ORDER BY to_time_ns"
        )
        for row in self._paged(sql, (_high(to_ns),), (_low(from_ns),), 1):
            yield Interval(*row)

    def bookmarks(self) -> Iterator[Bookmark]:
        """By time, then name."""
        sql = (
            "SELECT time_ns, name, name, seq, time_ns FROM bookmarks"
            " WHERE (time_ns, name) > (?, ?) ORDER BY time_ns, name"
        )
        for row in self._paged(sql, (), (_low(None), ""), 2):
            yield _bookmark(row)

    def gaps(self) -> Iterator[Gap]:
        sql = (
            "SELECT to_time_ns, id, from_seq, from_time_ns, to_seq, to_time_ns, cause FROM gaps"
            " WHERE (to_time_ns, id) > (?, ?) ORDER BY to_time_ns, id"
        )
        for row in self._paged(sql, (), (_low(None), 0), 2):
            yield Gap(*row)

    def minutes(self, first: int, end: int) -> Iterator[int]:
        """Minutes since the epoch in [first, end) that have a reachable instant."""
        sql = "SELECT minute, minute FROM minutes WHERE minute > ? AND minute < ? ORDER BY minute"
        for (minute,) in self._paged(sql, (end,), (first - 1,), 1):
            yield minute

    def next_minute(self, first: int) -> int | None:
        row = self._row("SELECT minute FROM minutes WHERE minute >= ? ORDER BY minute LIMIT 1", first)
        return row[0] if row else None

    def seconds(self, minute: int) -> int:
        """Bit i: second i of that minute has a reachable instant."""
        row = self._row("SELECT seconds FROM minutes WHERE minute = ?", minute)
        return row[0] if row else 0

    # What is added

    def commit(self, commit: Commit) -> None:
        """Adds all of it or nothing; durable when it returns."""
        manifest = commit.manifest
        with self._lock, _errors(self.path), self._db:
            if commit.snapshot is not None:
                self._insert_snapshot(commit, commit.snapshot)
            for bookmark in manifest.bookmarks:  # one that is there stays: nothing is ever rewritten
                self._db.execute(
                    "INSERT INTO bookmarks VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
                    (bookmark.name, bookmark.seq, bookmark.time_ns),
                )
            for gap in manifest.gaps:
                self._db.execute(
                    "INSERT INTO gaps VALUES (NULL, ?, ?, ?, ?, ?)",
                    (gap.from_seq, gap.from_time_ns, gap.to_seq, gap.to_time_ns, gap.cause),
                )
            self._put_meta("mark", manifest.mark)
            self._put_meta("protected_through_ns", manifest.protected_through_ns)

    def _put_meta(self, key: str, value: int) -> None:
        """Sets a number that never goes back."""
        sql = (
            "INSERT INTO meta VALUES (?, ?)"
            " ON CONFLICT (key) DO UPDATE SET value = max(value, excluded.value)"
        )
        self._db.execute(sql, (key, value))

    def _insert_snapshot(self, commit: Commit, snapshot: Snapshot) -> None:
        self._db.execute(
            "INSERT INTO snapshots VALUES (?, ?, ?, ?)",
            (snapshot.id, snapshot.seq, snapshot.time_ns, snapshot.mark),
        )
        self._db.executemany(
            "INSERT INTO roots VALUES (?, ?, ?, ?)",
            [
                (snapshot.id, i, to_signed(root.pointer), to_signed(root.checksum))
                for i, root in enumerate(commit.roots)
            ],
        )
        if (interval := commit.interval) is not None:
            self._db.execute(
                "INSERT INTO intervals VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    interval.snapshot, interval.from_snapshot, interval.from_seq, interval.from_time_ns,
                    interval.to_seq, interval.to_time_ns, interval.first_time_ns, interval.granularity_ns,
                    interval.cause, interval.journal_rows,
                ),
            )  # fmt: skip
        for item in commit.objects:
            self._db.execute(
                "INSERT INTO objects VALUES (?, ?, ?, ?, ?, ?)",
                (
                    item.name,
                    item.kind,
                    item.snapshot,
                    item.data_bytes,
                    item.tail_bytes,
                    to_signed(item.tail_checksum),
                ),
            )
        self._db.executemany(
            "INSERT INTO minutes VALUES (?, ?)"
            " ON CONFLICT (minute) DO UPDATE SET seconds = seconds | excluded.seconds",
            list((commit.minutes or {}).items()),
        )
        self._put_meta("next_snapshot", snapshot.id + 1)


def _low(from_ns: int | None) -> int:
    """Key just before `from_ns`."""
    return -(1 << 63) if from_ns is None else from_ns - 1


def _high(to_ns: int | None) -> int:
    return (1 << 63) - 1 if to_ns is None else to_ns
