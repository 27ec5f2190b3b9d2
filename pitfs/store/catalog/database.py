"""The catalog's database: SQLite in WAL mode, every row with a checksum, its errors in our words.

SQLite doesn't notice a bit that flips on the disk. So each row ends with a checksum, the xxh3_64 of the msgpack array
[table, value, …] of the values as SQLite has them. It is compared whenever the row is read, and a row that was looked
for by its key must have that key.

Tables and columns keep the names that the first catalogs gave them (the checksums have a table's name in):

    tails   open intervals (`log_end` is where the durable part of the write-ahead log ends)
    pieces  sorted runs of an open interval; `fence_…` is the run's sparse index
    `snapshot`, `fourth`: id of the snapshot at an interval's end    `from_snapshot`: of its base snapshot
    `tail_bytes`, `tail_checksum`: of an object's footer
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Literal
from urllib.parse import quote

import apsw
import msgspec
from xxhash import xxh3_64_intdigest

from pitfs.errors import (
    CapacityError,
    CorruptionError,
    DiskFullError,
    PitfsError,
    StoreError,
    StoreVersionError,
)

Mode = Literal["read", "write", "make"]

CATALOG_VERSION: Final = 3  # 1: journals without layers, 2: no open intervals; before the first release
PAGE_ROWS: Final = 512  # rows that a listing holds at once
# A listing begins with fewer and takes twice as many each time: most listings are of a short time, and a reader of a
# directory may go on in another process for each reply.
FIRST_PAGE_ROWS: Final = 16
DURABLE: Final = "FULL"  # a commit syncs the log
NOT_DURABLE: Final = "NORMAL"  # the next commit that is durable does
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
CREATE TABLE tails (  -- id is the log's, fourth that of the snapshot to come; mark 0: the interval is open
    id INTEGER PRIMARY KEY, fourth INTEGER NOT NULL, from_snapshot INTEGER NOT NULL,
    from_seq INTEGER NOT NULL, from_time_ns INTEGER NOT NULL, to_seq INTEGER NOT NULL, to_time_ns INTEGER NOT NULL,
    first_time_ns INTEGER, log_end INTEGER NOT NULL, mark INTEGER NOT NULL, protected_through_ns INTEGER NOT NULL,
    bookmark TEXT, row_checksum INTEGER NOT NULL
) STRICT;
CREATE TABLE pieces (  -- of a tail's log: rows of first_seq to to_seq
    tail INTEGER NOT NULL, first_seq INTEGER NOT NULL, first_time_ns INTEGER NOT NULL, to_seq INTEGER NOT NULL,
    level INTEGER NOT NULL, row_count INTEGER NOT NULL,
    fence_offset INTEGER NOT NULL, fence_bytes INTEGER NOT NULL, fence_checksum INTEGER NOT NULL,
    row_checksum INTEGER NOT NULL, PRIMARY KEY (tail, first_seq)
) STRICT, WITHOUT ROWID;
"""

# Tables that came later. A writer adds those that are missing; an older pitfs doesn't look at them.
_ADDED: Final = """
CREATE TABLE IF NOT EXISTS moved (  -- byte o of object `name` is byte base + o of the file of object `host`
    name TEXT PRIMARY KEY, host TEXT NOT NULL, base INTEGER NOT NULL, row_checksum INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS moved_by_host ON moved (host);
CREATE TABLE IF NOT EXISTS removals (  -- snapshots between these two were removed, their objects not yet; equal: the
    -- difference journal of the interval that ends there is being thinned
    before_id INTEGER PRIMARY KEY, after_id INTEGER NOT NULL, row_checksum INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS digests (  -- of a volume at a snapshot, as production took it
    snapshot INTEGER NOT NULL, volume INTEGER NOT NULL, high INTEGER NOT NULL, low INTEGER NOT NULL,
    row_checksum INTEGER NOT NULL, PRIMARY KEY (snapshot, volume)
) STRICT, WITHOUT ROWID;
"""

_NO_INDEX: Final = (apsw.SQLITE_IOERR_SHMOPEN, apsw.SQLITE_IOERR_SHMSIZE, apsw.SQLITE_IOERR_SHMMAP)
REMEDY: Final = "make it again with `pitfs check STORE --rebuild`"


# Columns that are unsigned, by number: SQLite has the signed integer with the same bits.
_UNSIGNED: Final = {"roots": (2, 3), "objects": (5,), "pieces": (8,), "digests": (2, 3)}
_UNCHECKED: Final = {"gaps": 1}  # columns before those that the checksum is of: SQLite gives gaps their id


def _to_signed(value: Any) -> Any:
    return value - (1 << 64) if isinstance(value, int) and value >= 1 << 63 else value


def _row_checksum(table: str, values: Sequence[Any]) -> Any:
    return _to_signed(xxh3_64_intdigest(msgspec.msgpack.encode((table, *values))))


@contextmanager
def _errors(path: str) -> Iterator[None]:
    """SQLite's errors in our words."""
    try:
        yield
    except apsw.FullError:
        raise DiskFullError(f"{path}: No space left on device") from None
    except (apsw.CorruptError, apsw.NotADBError, apsw.SQLError, UnicodeDecodeError) as error:  # also of the schema
        raise CorruptionError(path, 0, f"{error}: {REMEDY}") from None
    except UnicodeEncodeError:
        raise StoreError(f"{path}: SQLite takes no path that isn't UTF-8: rename the directory") from None
    except apsw.IOError as error:
        if getattr(error, "extendedresult", 0) not in _NO_INDEX:
            raise PitfsError(f"{path}: {error}") from error
        raise CapacityError(
            f"{path}: its index ({path}-shm) can't be made, for reading as well: make room on that file system (32 KiB)"
        ) from error
    except apsw.CantOpenError:
        raise StoreError(f"{path}: can't be opened: is it there, and may this user read it?") from None
    except apsw.Error as error:
        raise PitfsError(f"{path}: {error}") from error


class Database:
    """One connection to a store's catalog; may be used from several threads, but not across fork.

    Args:
        path: catalog.sqlite.
        mode: "make" is "write", and makes the catalog if it isn't there.

    Raises:
        StoreError, StoreVersionError, CorruptionError, CapacityError, PitfsError: also from every method.
    """

    def __init__(self, path: str, mode: Mode = "read") -> None:
        self.path = path
        self._lock = threading.RLock()  # held from what a change builds on until it is committed
        self._is_changing = False
        with _errors(path):
            self._db = self._connect(mode)
        try:
            with _errors(path):
                self._prepare(mode)
        except BaseException:
            self._db.close()
            raise

    def _connect(self, mode: Mode) -> apsw.Connection:
        if mode != "read":
            return apsw.Connection(self.path, flags=apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE)
        if not os.statvfs(self.path).f_flag & os.ST_RDONLY:
            writable = os.access(self.path, os.W_OK)  # a reader writes the -shm file where it may
            flags = apsw.SQLITE_OPEN_READWRITE if writable else apsw.SQLITE_OPEN_READONLY
            return apsw.Connection(self.path, flags=flags)
        # On a read-only file system nobody writes. SQLite has no -shm file there, and doesn't look into its log.
        log = f"{self.path}-wal"
        if os.path.exists(log) and os.path.getsize(log):
            raise StoreError(
                f"{self.path}: on a read-only file system with a log ({log}) that isn't merged: mount it read-write "
                "once, or copy the store to where it can be written"
            )
        uri = f"file:{quote(self.path)}?immutable=1"
        return apsw.Connection(uri, flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI)

    def _prepare(self, mode: Mode) -> None:
        self._db.set_busy_timeout(BUSY_MS)
        (version,) = self.rows("PRAGMA user_version")[0]
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
            raise StoreError(f"{self.path}: no catalog of a store: {REMEDY}")
        if mode == "read":
            self._db.execute("PRAGMA query_only = 1")
            return
        if version == 0:  # before there is a table: then what a removal frees can be given back
            self._db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute(f"PRAGMA synchronous = {DURABLE}")
        with self._db:
            if version == 0:
                self._db.execute(_SCHEMA)
                self._db.execute(f"PRAGMA user_version = {CATALOG_VERSION}")
            self._db.execute(_ADDED)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def rows(self, sql: str, bindings: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self._lock, _errors(self.path):
            return list(self._db.execute(sql, tuple(bindings)))

    def verified(self, table: str, row: tuple[Any, ...]) -> tuple[Any, ...]:
        """What was put. Raises CorruptionError if the row isn't the one that was written."""
        values = list(row[_UNCHECKED.get(table, 0) : -1])
        if row[-1] != _row_checksum(table, values):
            raise CorruptionError(self.path, 0, f"a row of {table} doesn't match its checksum: {REMEDY}")
        for column in _UNSIGNED.get(table, ()):
            values[column] &= (1 << 64) - 1
        return tuple(values)

    def row(self, table: str, sql: str, *bindings: Any) -> tuple[Any, ...] | None:
        """The first row that `SELECT * FROM table` with `sql` behind it finds."""
        rows = self.rows(f"SELECT * FROM {table} {sql} LIMIT 1", bindings)
        return self.verified(table, rows[0]) if rows else None

    def row_of(self, table: str, name: str, key: Any, column: int = 0) -> tuple[Any, ...] | None:
        """The row whose column, of that name and number, has that value.

        An index that leads to another row is damaged.
        """
        row = self.row(table, f"WHERE {name} = ?", key)
        if row is not None and row[column] != key:
            raise CorruptionError(self.path, 0, f"the index of {table} is damaged: {REMEDY}")
        return row

    @contextmanager
    def changes(self, durable: bool = True) -> Iterator[None]:
        """A transaction, of one process at a time: what is read in it stays so until it is committed.

        durable: survives power loss when it returns; else the catalog may be the one before then. Within another one it
        is a part of that.
        """
        with self._lock, _errors(self.path):
            if self._is_changing:
                yield
                return
            if not durable:
                self._db.execute(f"PRAGMA synchronous = {NOT_DURABLE}")
            try:
                # At once: a transaction that has read before another commits could no longer write.
                self._db.execute("BEGIN IMMEDIATE")
                self._is_changing = True
                try:
                    yield
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise
            finally:
                self._is_changing = False
                if not durable:
                    self._db.execute(f"PRAGMA synchronous = {DURABLE}")

    def put(self, table: str, values: Sequence[Any], conflict: str = "") -> list[Any]:
        """Inserts a row with its checksum; within `changes`. Returns it as SQLite has it."""
        row = [*map(_to_signed, values)]
        row.append(_row_checksum(table, row[_UNCHECKED.get(table, 0) :]))
        places = ", ".join(f"?{number}" for number in range(1, len(row) + 1))
        self._db.execute(f"INSERT INTO {table} VALUES ({places}) {conflict}", row)
        if row[0] is None:
            row[0] = self._db.last_insert_rowid()
        return row

    def delete(self, table: str, name: str, key: Any) -> None:
        """Deletes the rows whose column of that name has that value; within `changes`."""
        self.delete_range(table, name, key, key)

    def delete_range(self, table: str, name: str, first: Any, last: Any) -> None:
        """Deletes the rows whose column of that name is in [first, last]; within `changes`."""
        self._db.execute(f"DELETE FROM {table} WHERE {name} BETWEEN ? AND ?", (first, last))

    def has_table(self, table: str) -> bool:
        """Whether there is a table that came later: not before a writer of this version has opened the catalog."""
        return bool(self.rows("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (table,)))

    @contextmanager
    def one_moment(self) -> Iterator[None]:
        """What is read in it is of one moment, whatever is committed meanwhile."""
        with self._lock, _errors(self.path), self._db:
            yield
