"""The catalog's log: all that is committed to the catalog durably, appended, so that the catalog can be made again.

`Database.changes` writes a record, durably, before each COMMIT, as it is in the transaction: processes take turns. The
catalog says in its table meta which log is its (`log`, a random number) and where that ends (`log_end`). So a record
whose commit failed lies behind `log_end`, and the next one is written over it. Until then a rebuild counts it as
committed. That is right: before a COMMIT all that it names is durable, and what takes back the objects of a failed one
commits first (`Catalog.write_over`). Rows keep the checksums that they have in the catalog. Not in it are the tables
that can be made up from objects (`UNLOGGED`), and where a write-ahead log ends, which isn't committed durably.

STORE/catalog.log, little-endian:

    offset size
     0      8   magic      "PITFSLOG"
     8      4   version    1
    12      4   reserved
    16     16   history    of the store, as in object headers
    32      8   number     of this log
    40      8   base_end   byte where the base ends: records with all rows as they were when the log began
    48      8   checksum   xxh3_64 of bytes 0..48

Then records, one behind the other:

     0      8   magic       "PITFSCHG"
     8      8   offset      byte of the file where this begins
    16      8   body_bytes
    24      8   checksum    xxh3_64, seeded with the log's number, of bytes 0..24 and of the body
    32          body        zlib (RFC 1950) of a msgpack array of changes, in order: [table, [row, …]] are rows that
                            were put, each in the place of the one with its key, [table, column, first, last] deletes
                            the rows whose column is in [first, last]. A commit that was durable begins with `meta`

Behind the last one are zeros, or what is left of one that it was written over. A record that isn't whole is a torn end
if none that is whole lies behind it, else damage.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from secrets import randbits
from typing import Any, Final, Self

import msgspec
from xxhash import xxh3_64_intdigest

from pitfs.errors import CorruptionError, PitfsError, StoreError, StoreVersionError
from pitfs.storage.files import closed_on_error, fsync_directory, storage_error, write_all
from pitfs.store.catalog.database import PAGE_ROWS, REMEDY, Database, Mode
from pitfs.store.objects.format import CATALOG, CATALOG_LOG, STORE_JSON

VERSION: Final = 1
MAGIC: Final = b"PITFSLOG"
HEADER: Final = struct.Struct("<8sII16sQQ")
RECORD_MAGIC: Final = b"PITFSCHG"
RECORD: Final = struct.Struct("<8sQQ")
CHECKSUM: Final = struct.Struct("<Q")
HEADER_BYTES: Final = HEADER.size + CHECKSUM.size
RECORD_BYTES: Final = RECORD.size + CHECKSUM.size
assert (HEADER.size, RECORD.size) == (48, 24)

MADE_AGAIN: Final = -1  # the number of the log, in a catalog that was made again: whichever there is, a new one is due
UNLOGGED: Final = frozenset({"minutes", "pieces"})
# A new log is made when this one has twice the bytes of its base and so many more: 4 s for 10**6 intervals.
RENEWED_BEYOND_BYTES: Final = 1 << 18
AHEAD_BYTES: Final = 16 << 10
_LEVEL: Final = 1
_SEARCH_BYTES: Final = 1 << 20

Change = Sequence[Any]


@dataclass(slots=True)
class CatalogLog:
    """An open log; `fd` is closed with it. `history`: 16 bytes, `number`, `base_end`: as in its header.

    Attributes:
        end: byte where what was read or written ends.
    """

    path: str
    fd: int
    history: bytes
    number: int = field(default_factory=lambda: randbits(62))
    base_end: int = 0
    end: int = HEADER_BYTES

    @classmethod
    def create(cls, path: str, history: bytes, base: Iterable[Change]) -> Self:
        """A new one in the place of the one that is there, durable. Raises OSError."""
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        with closed_on_error(os.open(f"{path}.new", flags, 0o600)) as fd:
            log = cls(path, fd, history)
            for change in base:
                log.append(log.end, [change])
            log.base_end = log.end
            head = HEADER.pack(MAGIC, VERSION, 0, history, log.number, log.end)
            write_all(fd, head + CHECKSUM.pack(xxh3_64_intdigest(head)), 0)
            os.fsync(fd)
            os.rename(f"{path}.new", path)
            fsync_directory(os.path.dirname(path) or ".")
        return log

    @classmethod
    def open(cls, path: str, access: int = os.O_RDWR) -> Self:
        """Raises FileNotFoundError, OSError, CorruptionError: it isn't one, StoreVersionError."""
        with closed_on_error(os.open(path, access | os.O_CLOEXEC)) as fd:
            data = os.pread(fd, HEADER_BYTES, 0)
            if data[HEADER.size :] != CHECKSUM.pack(xxh3_64_intdigest(data[: HEADER.size])):
                raise CorruptionError(path, 0, "no header of a catalog's log")
            magic, version, _, history, number, base_end = HEADER.unpack_from(data)
            if (magic, version) != (MAGIC, VERSION):
                raise StoreVersionError(f"{path}: log of version {version}, not {VERSION}: use a newer pitfs")
            return cls(path, fd, history, number, base_end)

    def append(self, offset: int, changes: Sequence[Change]) -> None:
        """Writes a record at that byte, in the place of what is there; not durable. Raises OSError."""
        body = zlib.compress(msgspec.msgpack.encode(changes), _LEVEL)
        head = RECORD.pack(RECORD_MAGIC, offset, len(body))
        self.end = offset + RECORD_BYTES + len(body)
        # Room ahead, so that most syncs write data only, and no size of the file.
        ahead = bytes(AHEAD_BYTES) if self.end > os.fstat(self.fd).st_size else b""
        checksum = CHECKSUM.pack(xxh3_64_intdigest(head + body, self.number))
        write_all(self.fd, head + checksum + body + ahead, offset)

    def records(self, offset: int, damaged: Callable[[int, int], None] | None = None) -> Iterator[list[Change]]:
        """The changes of each whole record from that byte on.

        damaged: called with the bounds of what isn't whole and lies before a record that is; they are passed over.

        Raises:
            CorruptionError: there is such damage, and no `damaged`.
            OSError: the disk refuses.
        """
        self.end = offset
        while True:
            body = self._body(self.end)
            if body is not None:
                self.end += RECORD_BYTES + len(body)
                yield msgspec.msgpack.decode(zlib.decompress(body), type=list[list[Any]])
                continue
            behind = self._next(self.end + 1)
            if behind is None:
                return
            if damaged is None:
                raise CorruptionError(self.path, self.end, f"records up to byte {behind} aren't what was written")
            damaged(self.end, behind)
            self.end = behind

    def _body(self, offset: int) -> bytes | None:
        """Of the record there; None if it isn't whole."""
        head = os.pread(self.fd, RECORD_BYTES, offset)
        if len(head) < RECORD_BYTES or RECORD.unpack_from(head)[:2] != (RECORD_MAGIC, offset):
            return None
        body_bytes = min(RECORD.unpack_from(head)[2], os.fstat(self.fd).st_size)
        body = os.pread(self.fd, body_bytes, offset + RECORD_BYTES)
        checksum = xxh3_64_intdigest(head[: RECORD.size] + body, self.number)
        return body if head[RECORD.size :] == CHECKSUM.pack(checksum) else None

    def _next(self, offset: int) -> int | None:
        """The next byte from there on where a whole record begins."""
        while data := os.pread(self.fd, _SEARCH_BYTES, offset):
            at = data.find(RECORD_MAGIC)
            while at >= 0:
                if self._body(offset + at) is not None:
                    return offset + at
                at = data.find(RECORD_MAGIC, at + 1)
            offset += max(1, len(data) - len(RECORD_MAGIC) + 1)
        return None

    def close(self) -> None:
        os.close(self.fd)


class LoggedDatabase(Database):
    """A database whose durable changes come to the catalog's log, where it is a store's catalog and not only read.

    The log begins with the first of them: in a store of before, or that an older pitfs has written since.

    Raises:
        StoreError: the log has more than the catalog.
    """

    def __init__(self, path: str, mode: Mode = "read") -> None:
        super().__init__(path, mode)
        self._log_path = os.path.join(os.path.dirname(path), CATALOG_LOG)
        self._is_logged = mode != "read" and os.path.basename(path) == CATALOG
        self._inode = os.stat(path).st_ino
        self._log: CatalogLog | None = None
        self._changes: list[Change] | None = None  # of the transaction that is under way
        self._is_changed = self._is_log_outdated = False
        self._logged_meta: dict[str, int] = {}
        log = self._fitting_log() if self._is_logged else None
        if log is not None:
            self._is_log_outdated = self.meta("log_through") != self._log_through()
        if self._is_logged and self.is_older():
            self._is_log_outdated = True
            self.close()
            raise StoreError(f"{path}: older than its log, {self._log_path}: {REMEDY}")

    def is_older(self) -> bool:
        """Whether the log has more than the catalog, which is an older one that was put back."""
        while True:  # others may commit, or begin a log, while it looks
            number, end = self.meta("log"), self.meta("log_end")
            if (log := self._fitting_log()) is not None:
                behind = [changes[0][0] == "meta" for changes in log.records(end)]
                # One may be of a commit that failed; those that weren't durable a power loss may undo.
                is_older = bool(sum(behind) > 1)
            else:
                is_older = self._is_behind_another_log()
            if not is_older or (number, end) == (self.meta("log"), self.meta("log_end")):
                return is_older

    def close(self) -> None:
        with self._lock, suppress(PitfsError):
            if self._is_logged and self._log is not None and not self._is_log_outdated:
                with self.changes():
                    self._is_changed = True  # how far it is protected may not have been committed durably
        super().close()
        self._swap_log(None)

    def meta(self, key: str) -> int:
        """`mark`, `mark_seq`, `protected_through_ns`, `next_snapshot`, `epoch`, `instance`; 0: nothing yet."""
        row = self.row_of("meta", "key", key)
        return int(row[1]) if row else 0

    def _put_meta(self, key: str, value: int) -> None:
        self.put("meta", (key, value), "ON CONFLICT DO UPDATE SET value = ?2, row_checksum = ?3")

    @contextmanager
    def changes(self, durable: bool = True) -> Iterator[None]:
        with self._lock:
            is_outer = self._changes is None
            try:
                with super().changes(durable):
                    if is_outer:
                        self._changes, self._is_changed = [], False
                        if self._is_logged and os.stat(self.path).st_ino != self._inode:
                            raise StoreError(f"{self.path}: was made again meanwhile: begin anew with that one")
                    yield
                    is_due = self._is_changed if durable else any(each[0] != "tails" for each in self._changes or ())
                    if is_outer and is_due and self._is_logged:
                        self._write_log(durable)
            except BaseException:
                self._logged_meta = {}  # what was logged of it is written over
                raise
            finally:
                self._changes = None if is_outer else self._changes

    def put(self, table: str, values: Sequence[Any], conflict: str = "") -> list[Any]:
        row = super().put(table, values, conflict)
        if table not in UNLOGGED and self._db.changes():
            last = self._changes[-1] if self._changes else ()
            if len(last) == 2 and last[0] == table:
                last[1].append(row)
            else:
                self._note(table, [row])
        return row

    def delete_range(self, table: str, name: str, first: Any, last: Any) -> None:
        super().delete_range(table, name, first, last)
        if table not in UNLOGGED and self._db.changes():
            self._note(table, name, first, last)

    def _note(self, *change: Any) -> None:
        self._is_changed = True
        if self._changes is not None and change[0] != "meta":  # of which comes what is new: `_new_meta`
            self._changes.append(change)

    def replay(self, changes: Sequence[Change]) -> None:
        """Does what a record of the log has; within `changes`."""
        for table, *change in changes:
            if len(change) == 3:
                super().delete_range(table, *change)
            elif change[0]:
                places = ", ".join("?" * len(change[0][0]))
                self._db.executemany(f"INSERT OR REPLACE INTO {table} VALUES ({places})", change[0])

    def name_no_log(self) -> None:
        """Of a catalog that is made again; within `changes`."""
        for key in ("log_end", "log_through"):
            self.delete("meta", "key", key)
        self._put_meta("log", MADE_AGAIN)

    def _swap_log(self, log: CatalogLog | None) -> None:
        if self._log is not None:
            self._log.close()
        self._log = log

    def _fitting_log(self) -> CatalogLog | None:
        """The log, if it is the one that the catalog names, and reaches as far."""
        number = self.meta("log")
        if self._log is None or self._log.number != number:
            self._swap_log(None)
            with suppress(FileNotFoundError, CorruptionError):
                self._log = CatalogLog.open(self._log_path, os.O_RDWR if self._is_logged else os.O_RDONLY)
        log, status = self._log, os.fstat(self._log.fd) if self._log is not None else None
        is_whole = status is not None and status.st_nlink > 0 and status.st_size >= self.meta("log_end")
        return log if log is not None and log.number == number and is_whole else None

    def _is_behind_another_log(self) -> bool:
        """Whether the log isn't the catalog's, and was begun by what came later than the catalog's next commit.

        A log's base has the catalog as it was: with the log of before, and where that ended.
        """
        log, number = self._log, self.meta("log")
        if log is None or log.number == number or number == MADE_AGAIN or log.history != self._history():
            return False
        try:
            changes = (change for record in log.records(HEADER_BYTES) for change in record)
            before = {row[0]: row[1] for row in next((rows for table, *(rows, *_) in changes if table == "meta"), ())}
            is_next = (before.get("log", 0), before.get("log_end", 0)) == (number, self.meta("log_end"))
            return not is_next or next(log.records(log.base_end), None) is not None
        except CorruptionError:
            return False

    def _log_through(self) -> int:
        """A number that an older pitfs, which doesn't write the log, changes."""
        return self.meta("mark") + self.meta("next_snapshot")

    def _write_log(self, durable: bool) -> None:
        """Writes what this transaction changes, durably; all that there is where a new log is due."""
        try:
            log, end = self._fitting_log(), self.meta("log_end")
            is_outdated = self._is_log_outdated or (log and end > 2 * log.base_end + RENEWED_BEYOND_BYTES)
            if log is not None and not is_outdated:
                meta = [("meta", self._new_meta())] if durable else []
                log.append(end, [*meta, *(self._changes or ())])
                os.fdatasync(log.fd)
            else:
                log = CatalogLog.create(self._log_path, self._history(), self._all_rows())
                self._swap_log(log)
                self._is_log_outdated = False
        except OSError as error:
            raise storage_error(error, self._log_path, "writing") from error
        for key, value in (("log", log.number), ("log_end", log.end), ("log_through", self._log_through())):
            self._put_meta(key, value)

    def _all_rows(self) -> Iterator[Change]:
        """Of all tables that are logged, a page at a time."""
        for (table,) in self.rows("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"):
            rows = self._db.execute(f"SELECT * FROM {table}") if table not in UNLOGGED else iter(())
            while page := list(islice(rows, PAGE_ROWS)):
                yield table, page

    def _new_meta(self) -> list[tuple[Any, ...]]:
        """Rows of `meta` that this process hasn't logged as they are: some were committed before, not durably."""
        rows = [row for row in self.rows("SELECT * FROM meta") if not row[0].startswith("log")]
        known, self._logged_meta = self._logged_meta, {row[0]: row[1] for row in rows}
        return [row for row in rows if known.get(row[0]) != row[1]]

    def _history(self) -> bytes:
        with suppress(FileNotFoundError), open(os.path.join(os.path.dirname(self.path), STORE_JSON), "rb") as file:
            return bytes.fromhex(msgspec.json.decode(file.read(1 << 20), type=dict)["history"])
        return bytes(16)
