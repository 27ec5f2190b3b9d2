"""Small survivors of a removal are moved behind the end of an object that stays: a file takes a header, and an inode.

What was copied doesn't count before the catalog's commit: it is cut off the next time.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final

from pitfs.errors import CorruptionError
from pitfs.storage.files import closed_on_error, open_fd, read_exactly, write_all
from pitfs.store.catalog.database import REMEDY
from pitfs.store.objects.format import HEADER_BYTES, ObjectName
from pitfs.store.retention.liveness import Live
from pitfs.store.transfer.writable_store import WritableStore

COPY_BYTES: Final = 1 << 20


@dataclass(slots=True)
class Part:
    """An object in a file: byte o of it is byte base + o. `first`: byte of the file, of what is live, -1: nothing."""

    name: ObjectName
    base: int = 0
    first: int = -1

    @property
    def is_live(self) -> bool:
        return self.first >= 0


@dataclass(slots=True)
class ObjectFile:
    """A file of objects/.

    Attributes:
        parts: its own object, and those that were moved there.
        live_bytes: what they have that is live, in whole blocks of the file system.
        span_bytes: from the first to the last of these.
    """

    name: ObjectName
    parts: list[Part] = field(init=False)
    live_bytes: int = 0
    span_bytes: int = 0

    def __post_init__(self) -> None:
        self.parts = [Part(self.name)]


class Mover(AbstractContextManager["Mover"]):
    """Copies what is live of files behind the end of a host's; durable when it ends. After an error nothing is there.

    Attributes:
        moved: (name, name of the host, base), as the catalog is to have them.
        grown_bytes: of the host, on the disk.

    Raises:
        CorruptionError: the catalog is damaged, or a file ends before what is live in it.
        OSError: the disk is full, or refuses; also from all methods.
    """

    def __init__(self, store: WritableStore, host: ObjectName, live: Live, block_bytes: int) -> None:
        self._store, self._host, self._live, self._block_bytes = store, host, live, block_bytes
        self.moved: list[tuple[str, str, int]] = []
        self.grown_bytes = 0
        self._path = store.objects.path_of(host)
        self._fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        with closed_on_error(self._fd):
            size = os.fstat(self._fd).st_size
            if size > self._committed_end("") and size > (end := self._committed_end("NOT INDEXED")):
                os.ftruncate(self._fd, end)
            self._before = self._after = os.fstat(self._fd)
        self._end = self._before.st_size

    def is_still(self) -> bool:
        """Whether what was copied is there as it was: another removal cuts off what isn't committed, too."""
        now = os.stat(self._path)
        return (now.st_size, now.st_mtime_ns) == (self._after.st_size, self._after.st_mtime_ns)

    def drop(self) -> None:
        """Cuts off what was copied."""
        if self.is_still():
            os.truncate(self._path, self._before.st_size)

    def _committed_end(self, how: str) -> int:
        """Byte behind all that the catalog says is in the host's file; `how` not to trust an index alone."""
        catalog, ends, host = self._store.catalog, [HEADER_BYTES], self._host.file
        rows = catalog.rows(f"SELECT * FROM moved {how} WHERE host = ?", (host,))
        for name, _, base in (*(catalog.verified("moved", row) for row in rows), (host, host, 0)):
            record = catalog.object(name)
            if record is None:
                raise CorruptionError(catalog.path, 0, f"it has moved {name}, but not the object: {REMEDY}")
            footer_bytes = record.footer_bytes if name == host else 0
            ends.append(base + HEADER_BYTES + record.data_bytes + footer_bytes)
        return max(ends)

    def take(self, file: ObjectFile) -> None:
        """Copies what is live in a file, each part as it is."""
        block, path = self._block_bytes, self._store.objects.path_of(file.name)
        if not os.path.exists(path):
            raise CorruptionError(path, 0, "the object is missing")
        with open_fd(path, os.O_RDONLY) as source:
            for part in file.parts:
                base: int | None = None
                for start, end in self._live.ranges(part.name):
                    if base is None:
                        base = -(-self._end // block) * block - start // block * block
                        self.moved.append((part.name.file, self._host.file, base))
                    for at in range(start, end, COPY_BYTES):
                        data = read_exactly(source, min(COPY_BYTES, end - at), part.base + at, path)
                        write_all(self._fd, data, base + at)
                    self._end = base + end

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                os.fsync(self._fd)
                self._after = os.fstat(self._fd)
                self.grown_bytes = (self._after.st_blocks - self._before.st_blocks) * 512
        except OSError as failed:
            error = failed
            raise
        finally:
            if isinstance(error, Exception):
                os.ftruncate(self._fd, self._before.st_size)
            os.close(self._fd)
