"""The catalog: what a store has. SQLite in WAL mode; its commit is the only moment anything comes to be.

Readers in any number of processes go on while the one writer commits. Every listing fetches bounded pages,
each by the key it goes on from, so none holds a read transaction open or grows with the history.

SQLite integers are signed: unsigned 64-bit pointers and checksums are stored as the signed number with the
same bits.

SQLite doesn't notice a bit that flips on the disk. So each row ends with a checksum (`row_checksum`), the xxh3_64
of the msgpack array [table, value, …], which is compared whenever the row is read, and a row that was looked for
by its key must have that key. What a damaged index hides, readers notice by the chain: each snapshot but the last
begins an interval that ends at the next.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from typing import Any, Final
from urllib.parse import quote

import apsw
import msgspec
from xxhash import xxh3_64_intdigest

from pitfs.errors import CapacityError, CorruptionError, PitfsError, StoreError, StoreVersionError
from pitfs.model.blockmap import Entry
from pitfs.model.transfer import Bookmark, Gap
from pitfs.store.facts import Commit, Interval, LayersCommit, ObjectFacts, Snapshot

CATALOG_VERSION: Final = 2  # 1: journals without layers; before the first release
PAGE_ROWS: Final = 512  # rows that a listing holds at once
BUSY_MS: Final = 10_000  # a commit or a checkpoint of another process takes far less

_SCHEMA: Final = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL, row_checksum INTEGER NOT NULL)
    STRICT, WITHOUT ROWID;
CREATE TABLE snapshots (
    id INTEGER PRIMARY KEY, seq INTEGER NOT NULL UNIQUE, time_ns INTEGER NOT NULL UNIQUE,
    mark INTEGER NOT NULL, row_checksum INTEGER NOT NULL
) STRICT;
CREATE TABLE roots (
    snapshot INTEGER NOT NULL, volume INTEGER NOT NULL, pointer INTEGER NOT NULL, checksum INTEGER NOT NULL,
    row_checksum INTEGER NOT NULL, PRIMARY KEY (snapshot, volume)
) STRICT, WITHOUT ROWID;
CREATE TABLE intervals (  -- snapshot is the one at its end
    snapshot INTEGER PRIMARY KEY, from_snapshot INTEGER NOT NULL UNIQUE,
    from_seq INTEGER NOT NULL, from_time_ns INTEGER NOT NULL UNIQUE,
    to_seq INTEGER NOT NULL, to_time_ns INTEGER NOT NULL UNIQUE,
    first_time_ns INTEGER, granularity_ns INTEGER, cause TEXT NOT NULL, journal_rows INTEGER NOT NULL,
    row_checksum INTEGER NOT NULL
) STRICT;
CREATE INDEX intervals_coarse ON intervals (snapshot) WHERE granularity_ns IS NOT 0;
CREATE TABLE objects (
    name TEXT PRIMARY KEY, kind INTEGER NOT NULL, snapshot INTEGER NOT NULL,
    data_bytes INTEGER NOT NULL, tail_bytes INTEGER NOT NULL, tail_checksum INTEGER NOT NULL,
    row_checksum INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE bookmarks (
    name TEXT PRIMARY KEY, seq INTEGER NOT NULL, time_ns INTEGER NOT NULL, row_checksum INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX bookmarks_by_time ON bookmarks (time_ns, name);
CREATE TABLE gaps (
    id INTEGER PRIMARY KEY, from_seq INTEGER NOT NULL, from_time_ns INTEGER NOT NULL,
    to_seq INTEGER NOT NULL, to_time_ns INTEGER NOT NULL, cause TEXT NOT NULL, row_checksum INTEGER NOT NULL
) STRICT;
CREATE INDEX gaps_by_time ON gaps (to_time_ns, id);
CREATE TABLE minutes (  -- bit i of seconds: second i of that minute since the epoch has a reachable instant
    minute INTEGER PRIMARY KEY, seconds INTEGER NOT NULL, row_checksum INTEGER NOT NULL
) STRICT;
"""


_REMEDY: Final = "put a copy of it back, or move the store away for a new full copy"


def to_signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def to_unsigned(value: int) -> int:
    return value & ((1 << 64) - 1)


def row_checksum(table: str, values: Sequence[Any]) -> int:
    """What the last column of a row of `table` must be; of `gaps` the id isn't among the values."""
    return to_signed(xxh3_64_intdigest(msgspec.msgpack.encode((table, *values))))


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
    except (apsw.CorruptError, apsw.NotADBError, UnicodeDecodeError) as error:
        raise CorruptionError(
            path, 0, f"{error}: {_REMEDY}"
        ) from None
    except apsw.CantOpenError:
        raise StoreError(f"{path}: can't be opened: is it there, and may this user read it?") from None
    except apsw.Error as error:
        raise PitfsError(f"{path}: {error}") from error


class Catalog:
    """One connection to a store's catalog; may be used from several threads, but not across fork.

    Args:
        path: catalog.sqlite.
        mode: "read", "write", "make" (as write, made if it isn't there).

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
        if mode != "read":
            return apsw.Connection(self.path, flags=apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE)
        if not os.statvfs(self.path).f_flag & os.ST_RDONLY:
            writable = os.access(self.path, os.W_OK)  # a reader needs the -shm file; read-only where it can't
            flags = apsw.SQLITE_OPEN_READWRITE if writable else apsw.SQLITE_OPEN_READONLY
            return apsw.Connection(self.path, flags=flags)
        # There nobody writes, and SQLite can't make its -shm file. It wouldn't look into the log either.
        log = f"{self.path}-wal"
        if os.path.exists(log) and os.path.getsize(log):
            raise StoreError(
                f"{self.path}: on a read-only file system with a log ({log}) that isn't merged: mount it read-write "
                "once, or copy the store to where it can be written"
            )
        uri = f"file:{quote(self.path)}?immutable=1"
        return apsw.Connection(uri, flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI)

    def _prepare(self, mode: str) -> None:
        self._db.set_busy_timeout(BUSY_MS)
        (version,) = self._rows("PRAGMA user_version")[0]
        if version > CATALOG_VERSION:
            raise StoreVersionError(
                f"{self.path}: catalog of version {version}, this pitfs knows up to {CATALOG_VERSION}: "
                f"use a newer pitfs"
            )
        if 0 < version < CATALOG_VERSION:
            raise StoreVersionError(
                f"{self.path}: catalog of version {version}, of a pitfs before the first release: read it with that "
                "one, and receive into a new store with this one"
            )
        if version == 0 and mode != "make":
            raise StoreError(
                f"{self.path}: no catalog of a store: {_REMEDY}"
            )
        if mode == "read":
            self._db.execute("PRAGMA query_only = 1")
            return
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        if version == 0:
            with self._db:
                self._db.execute(_SCHEMA)
                self._db.execute(f"PRAGMA user_version = {CATALOG_VERSION}")

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def _rows(self, sql: str, bindings: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self._lock, _errors(self.path):
            return list(self._db.execute(sql, tuple(bindings)))

    def _verified(self, table: str, row: tuple[Any, ...]) -> tuple[Any, ...]:
        """The row without its checksum. Raises CorruptionError if it isn't the one that was written."""
        *values, checksum = row
        if checksum != row_checksum(table, values):
            raise CorruptionError(self.path, 0, f"a row of {table} doesn't match its checksum: {_REMEDY}")
        return tuple(values)

    def _row(self, table: str, sql: str, *bindings: Any) -> tuple[Any, ...] | None:
        """The first row that `SELECT * FROM table` with `sql` behind it finds."""
        rows = self._rows(f"SELECT * FROM {table} {sql} LIMIT 1", bindings)
        return self._verified(table, rows[0]) if rows else None

    def _row_of(self, table: str, column: int, name: str, key: Any) -> tuple[Any, ...] | None:
        """The row whose column has that value; an index that leads to another one is damaged."""
        row = self._row(table, f"WHERE {name} = ?", key)
        if row is not None and row[column] != key:
            raise CorruptionError(self.path, 0, f"the index of {table} is damaged: {_REMEDY}")
        return row

    # What it says

    def data_version(self) -> int:
        """A number that changes when another connection commits."""
        return int(self._rows("PRAGMA data_version")[0][0])

    def meta(self, key: str) -> int:
        """`mark`, `protected_through_ns`, `next_snapshot`, `epoch`, `instance`; 0 where there is nothing yet."""
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

    def roots(self, snapshot: int) -> list[Entry]:
        """Roots of the block maps, one for each volume in order."""
        rows = self._rows("SELECT * FROM roots WHERE snapshot = ? ORDER BY volume", (snapshot,))
        found = [self._verified("roots", row) for row in rows]
        if [row[:2] for row in found] != [(snapshot, volume) for volume in range(len(found))]:
            raise CorruptionError(self.path, 0, f"roots of snapshot {snapshot} are missing: {_REMEDY}")
        return [Entry(to_unsigned(pointer), to_unsigned(checksum)) for _, _, pointer, checksum in found]

    def object(self, name: str) -> ObjectFacts | None:
        row = self._row_of("objects", 0, "name", name)
        if row is None:
            return None
        _, kind, snapshot, data_bytes, tail_bytes, checksum = row
        return ObjectFacts(name, kind, snapshot, data_bytes, tail_bytes, to_unsigned(checksum))

    def bookmark(self, name: str) -> Bookmark | None:
        if not name.isascii():  # the names of files that users type may have bytes that aren't text
            return None
        row = self._row_of("bookmarks", 0, "name", name)
        return _bookmark(row) if row else None

    def has_gap(self, after_ns: int, before_ns: int) -> bool:
        """Whether a gap overlaps the open stretch of time (after_ns, before_ns)."""
        sql = "SELECT 1 FROM gaps WHERE to_time_ns > ? AND from_time_ns < ? LIMIT 1"
        return bool(self._rows(sql, (after_ns, before_ns)))

    # Listings; from_ns is in, to_ns is out, None is no limit

    def _paged(
        self, table: str, columns: str, sql: str, bindings: Sequence[Any], key: tuple[Any, ...]
    ) -> Iterator[tuple[Any, ...]]:
        """Rows of a table, verified: the first bindings of `sql` are the key to go on from.

        Args:
            columns: as many as the key has, whose values in a row are the key behind it; then the row's own.
        """
        width = len(key)
        while True:
            rows = self._rows(f"SELECT {columns} FROM {table} {sql} LIMIT {PAGE_ROWS}", (*key, *bindings))
            for row in rows:
                yield self._verified(table, row[width:])
            if len(rows) < PAGE_ROWS:
                return
            key = rows[-1][:width]

    def snapshots(self, from_ns: int | None, to_ns: int | None) -> Iterator[Snapshot]:
        sql = "WHERE time_ns > ? AND time_ns < ? ORDER BY time_ns"
        for row in self._paged("snapshots", "time_ns, *", sql, (_high(to_ns),), (_low(from_ns),)):
            yield Snapshot(*row)

    def intervals(self, from_ns: int | None, to_ns: int | None) -> Iterator[Interval]:
        """Those that have an instant in the stretch of time."""
        sql = "WHERE to_time_ns > ? AND from_time_ns < ? ORDER BY to_time_ns"
        for row in self._paged("intervals", "to_time_ns, *", sql, (_high(to_ns),), (_low(from_ns),)):
            yield Interval(*row)

    def bookmarks(self, from_ns: int | None = None) -> Iterator[Bookmark]:
        """By time, then name."""
        sql = "WHERE (time_ns, name) > (?, ?) ORDER BY time_ns, name"
        first = _low(None) if from_ns is None else from_ns  # all names come after ""
        for row in self._paged("bookmarks", "time_ns, name, *", sql, (), (first, "")):
            yield _bookmark(row)

    def gaps(self) -> Iterator[Gap]:
        columns = "to_time_ns, id, from_seq, from_time_ns, to_seq, to_time_ns, cause, row_checksum"
        sql = "WHERE (to_time_ns, id) > (?, ?) ORDER BY to_time_ns, id"
        for row in self._paged("gaps", columns, sql, (), (_low(None), 0)):
            yield Gap(*row)

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

    # What is added

    def commit(self, commit: Commit) -> None:
        """Adds all of it or nothing; durable when it returns."""
        manifest = commit.manifest
        numbers = {"mark": manifest.mark, "protected_through_ns": manifest.protected_through_ns}
        if commit.snapshot is not None:
            numbers["next_snapshot"] = commit.snapshot.id + 1
        numbers = {key: max(value, self.meta(key)) for key, value in numbers.items()}  # they never go back
        minutes = {m: bits | self.seconds(m) for m, bits in (commit.minutes or {}).items()}
        with self._lock, _errors(self.path), self._db:
            if commit.snapshot is not None:
                self._insert_snapshot(commit, commit.snapshot)
            for b in manifest.bookmarks:  # one that is there stays: nothing is ever rewritten
                self._put("bookmarks", (b.name, b.seq, b.time_ns), "ON CONFLICT DO NOTHING")
            for gap in manifest.gaps:
                self._put(
                    "gaps (from_seq, from_time_ns, to_seq, to_time_ns, cause, row_checksum)",
                    (gap.from_seq, gap.from_time_ns, gap.to_seq, gap.to_time_ns, gap.cause),
                )
            self._put_minutes(minutes)
            for key, value in numbers.items():
                self._put_meta(key, value)

    def commit_layers(self, commit: LayersCommit) -> None:
        """Makes an interval finer, or nothing; durable when it returns."""
        minutes = {m: bits | self.seconds(m) for m, bits in commit.minutes.items()}
        with self._lock, _errors(self.path), self._db:
            if commit.replaced is not None:
                self._db.execute("DELETE FROM objects WHERE name = ?", (commit.replaced,))
            for item in commit.objects:
                self._db.execute("DELETE FROM objects WHERE name = ?", (item.name,))
                self._put_object(item)
            self._db.execute("DELETE FROM intervals WHERE snapshot = ?", (commit.base.snapshot,))
            self._put("intervals", astuple(commit.interval))
            self._put_minutes(minutes)

    def fence(self, epoch: int, instance: int) -> None:
        """From here on senders of an earlier epoch, or of the same and another instance, are refused."""
        if (self.meta("epoch"), self.meta("instance")) == (epoch, instance):
            return
        with self._lock, _errors(self.path), self._db:
            self._put_meta("epoch", epoch)
            self._put_meta("instance", instance)

    def write_over(self) -> None:
        """Commits a number that means nothing.

        A commit that failed may stand in the log all the same, and a power loss would bring it back. After
        this it can't: the log has been written over.
        """
        value = self.meta("written_over") + 1
        with self._lock, _errors(self.path), self._db:
            self._put_meta("written_over", value)

    def _put_meta(self, key: str, value: int) -> None:
        self._put("meta", (key, value), "ON CONFLICT DO UPDATE SET value = ?2, row_checksum = ?3")

    def _put(self, table: str, values: Sequence[Any], conflict: str = "") -> None:
        """Inserts a row with its checksum."""
        places = ", ".join(f"?{number}" for number in range(1, len(values) + 2))
        sql = f"INSERT INTO {table} VALUES ({places}) {conflict}"
        self._db.execute(sql, (*values, row_checksum(table.partition(" ")[0], values)))

    def _insert_snapshot(self, commit: Commit, snapshot: Snapshot) -> None:
        self._put("snapshots", (snapshot.id, snapshot.seq, snapshot.time_ns, snapshot.mark))
        for i, root in enumerate(commit.roots):
            self._put("roots", (snapshot.id, i, to_signed(root.pointer), to_signed(root.checksum)))
        if commit.interval is not None:
            self._put("intervals", astuple(commit.interval))
        for item in commit.objects:
            self._put_object(item)

    def _put_object(self, item: ObjectFacts) -> None:
        facts = (item.name, item.kind, item.snapshot, item.data_bytes, item.tail_bytes)
        self._put("objects", (*facts, to_signed(item.tail_checksum)))

    def _put_minutes(self, minutes: Mapping[int, int]) -> None:
        for minute in minutes.items():
            self._put("minutes", minute, "ON CONFLICT DO UPDATE SET seconds = ?2, row_checksum = ?3")


def _low(from_ns: int | None) -> int:
    """Key just before `from_ns`."""
    return -(1 << 63) if from_ns is None else max(from_ns - 1, -(1 << 63))


def _high(to_ns: int | None) -> int:
    return (1 << 63) - 1 if to_ns is None else min(to_ns, (1 << 63) - 1)
