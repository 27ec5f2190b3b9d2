"""Remembered damage: what readers met and what `pitfs check` found, in the store's file `damaged`.

A line for each place, at most MAX_PLACES: 16 hex digits, the xxh3_64 of what follows; a space; a `Damage` as JSON. A
line that doesn't match its checksum is passed over: the next check finds its place again. Whoever changes the file
holds the flock of the store's directory: readers append, `DamageLog.update` replaces the file.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Literal

import msgspec
from xxhash import xxh3_64_hexdigest

from pitfs.errors import PitfsError
from pitfs.storage.files import durable_replace, open_fd, storage_error
from pitfs.store.objects.format import ObjectKind

DAMAGED: Final = "damaged"
MAX_PLACES: Final = 4096  # 1 MiB
_DIGITS: Final = 16

Kind = Literal["content", "node", "index", "header", "missing", "catalog"]
KINDS: Final[dict[ObjectKind, Kind]] = {  # of what is read with a checksum, besides contents
    ObjectKind.MAP: "node",
    ObjectKind.JOURNAL_INDEX: "index",
    ObjectKind.JOURNAL_BLOCKS: "index",  # a sorted run
    ObjectKind.SNAPSHOT_BLOCKS: "content",
}


class Damage(msgspec.Struct, frozen=True, omit_defaults=True):
    """Bytes of an object that aren't those that were written.

    Attributes:
        object: name of its file; catalog.sqlite for the catalog.
        offset, size: bytes of the object, as if it had not been moved. All of it is missing where offset is 0.
        kind: `missing` are bytes behind the file's end; all others are there and wrong.
        volume, block: of a content, one block that has it. checksum: of the content as it was written.
        after_seq, through_seq: the write that brought it is in (after_seq, through_seq]; 0, 0: unknown.
        state: "gone": production has it no more.
    """

    object: str
    offset: int
    size: int
    kind: Kind
    volume: int | None = None
    block: int | None = None
    checksum: int | None = None
    after_seq: int = 0
    through_seq: int = 0
    state: Literal["", "gone"] = ""

    @property
    def place(self) -> tuple[str, int]:
        """What is remembered once."""
        return self.object, self.offset


class DamageLog:
    """The remembered damage of the store at `store`. Any number of processes add to it; nothing is open in between."""

    def __init__(self, store: str) -> None:
        self._store, self.path = store, os.path.join(store, DAMAGED)

    def known(self) -> list[Damage]:
        """All that is remembered, in the order in which it was met. Raises PitfsError: the disk refuses."""
        try:
            with open(self.path, "rb") as file:
                lines = file.read(MAX_PLACES << 10).split(b"\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise storage_error(error, self.path, "reading") from error
        return list(filter(None, map(_decode, lines)))

    def note(self, damage: Damage) -> None:
        """Remembers damage, once for each place, as far as there is room and the store can be written: no error."""
        try:
            known = self.known()  # first without the lock: a block may be read, and fail, any number of times
            if self._has_room(damage, known):
                with self._locked():
                    if self._has_room(damage, self.known()):
                        with open_fd(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as fd:
                            os.write(fd, b"\n" + _encode(damage))  # behind a line that was cut, if there is one
        except (OSError, PitfsError):
            return

    def update(self, change: Callable[[list[Damage]], list[Damage]]) -> None:
        """Replaces what is remembered by what `change` makes of it; durable, no other change comes between.

        Raises:
            PitfsError: the disk refuses; what was remembered is as it was.
        """
        try:
            with self._locked():
                damages = change(self.known())[:MAX_PLACES]
                if damages or os.path.exists(self.path):
                    durable_replace(self.path, b"\n".join(map(_encode, damages)))
        except OSError as error:
            raise storage_error(error, self.path, "writing") from error

    def replace(self, damages: list[Damage]) -> None:
        """Remembers these and nothing else. Raises as `update`."""
        self.update(lambda _: damages)

    def _has_room(self, damage: Damage, known: list[Damage]) -> bool:
        return len(known) < MAX_PLACES and damage.place not in {each.place for each in known}

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open_fd(self._store, os.O_RDONLY | os.O_DIRECTORY) as fd:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield


def _encode(damage: Damage) -> bytes:
    data = msgspec.json.encode(damage)
    return f"{xxh3_64_hexdigest(data)} ".encode() + data


def _decode(line: bytes) -> Damage | None:
    data = line[_DIGITS + 1 :]
    if line[: _DIGITS + 1] != f"{xxh3_64_hexdigest(data)} ".encode():
        return None
    try:
        return msgspec.json.decode(data, type=Damage)
    except msgspec.MsgspecError:  # of a newer pitfs
        return None
