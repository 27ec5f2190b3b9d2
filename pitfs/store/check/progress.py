"""How far a check came.

The file `check.progress` in the store (`check-data.progress` of a check with contents), as JSON, says how far it came
and when it was done. A check that was stopped goes on from there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import msgspec

from pitfs.storage.files import durable_replace
from pitfs.store.objects.damage import Damage

PROGRESS: Final = {False: "check.progress", True: "check-data.progress"}


class Progress(msgspec.Struct):
    """How far a check came: all of the history up to write `seq`, and of the next snapshot's map up to that leaf.

    Attributes:
        journal, rows: before that map, so many rows of that index.
        finished_ns: 0 while it is under way. found: so far.
    """

    has_data: bool
    seq: int = -1
    volume: int = 0
    leaf: int = 0
    journal: str = ""
    rows: int = 0
    objects: int = 0
    bytes: int = 0
    finished_ns: int = 0
    found: list[Damage] = []

    @classmethod
    def read(cls, store: str, has_data: bool) -> Progress:
        """Of the last check of that kind, finished or not; of a new one where there was none."""
        try:
            with open(os.path.join(store, PROGRESS[has_data]), "rb") as file:
                return msgspec.json.decode(file.read(), type=cls)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            return cls(has_data)

    @property
    def is_under_way(self) -> bool:
        """Whether some of it was done, and not all."""
        return not self.finished_ns and (self.seq, self.volume, self.leaf, self.rows) != (-1, 0, 0, 0)

    def save(self, store: str) -> None:
        with suppress(OSError):  # a store that can't be written is checked all the same
            durable_replace(os.path.join(store, PROGRESS[self.has_data]), msgspec.json.encode(self))


def at_rate(rate: int | None, reached: Callable[[int], None] = lambda count: None) -> Callable[[int], None]:
    """For `check`: waits where it reads more bytes than that a second, and says how many were read so far."""
    next_s, total = time.monotonic(), 0

    def paced(count: int) -> None:
        nonlocal next_s, total
        total += count
        reached(total)
        if rate is not None:
            next_s = max(next_s, time.monotonic() - 1) + count / rate
            time.sleep(max(0, next_s - time.monotonic()))

    return paced
