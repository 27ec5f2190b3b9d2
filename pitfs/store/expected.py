"""What the contents of a transfer must be: each block is compared with its row when it arrives.

Rows name contents by their place (`unit`) in a section of contents, in any order; contents arrive in the
order of their place. Kept in memory is a window of places that goes forward with the contents; when it moves,
the rows that fall into it are read again from where they are staged. Memory doesn't grow with the transfer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from pitfs.errors import RemoteProtocolError
from pitfs.model.blockmap import U64Array
from pitfs.model.transfer import UNIT_BYTES

WINDOW_SLOTS: Final = 1 << 20  # 9 MiB each; 4 GiB of contents at 4 KiB blocks
Rows = tuple[U64Array, U64Array, U64Array]  # units, sizes in units, checksums


class ExpectedContents:
    """Places, sizes and checksums of the blocks in one section of contents.

    Args:
        what: name of the section, for messages.
        slot_units: units of the smallest block of the group; every block begins at a multiple of it.
        reread: yields the rows staged so far that name contents of this section within units
            [first, second argument); may yield others as well.
        slots: of the window; at least what one payload fills.
    """

    def __init__(
        self,
        what: str,
        slot_units: int,
        reread: Callable[[int, int], Iterator[Rows]],
        slots: int,
    ) -> None:
        self._what = what
        self._slot_units = slot_units
        self._reread = reread
        self._start = 0  # slot where the window begins
        self._have = 0  # slot up to which contents were verified
        self._late = False  # a row named a place before the window
        self._slots = slots
        self._sizes: npt.NDArray[np.uint8] = np.zeros(
            slots, "u1"
        )  # in slots, at most 128; 0: nothing begins here
        self._checksums: U64Array = np.zeros(slots, "<u8")

    def resume(self, have_units: int) -> None:
        """Contents up to there were verified before; the window begins there."""
        self._late = have_units > 0  # not known: rows before the window aren't looked at again until the end
        self._move(have_units // self._slot_units)

    def add(self, rows: Rows) -> None:
        """Takes rows that have just arrived.

        Raises:
            RemoteProtocolError: a place in the middle of a block, or two rows that don't agree about a place.
        """
        units, sizes, checksums = rows
        slots = (units // self._slot_units).astype("<i8")
        if (units % self._slot_units).any():
            raise RemoteProtocolError(f"{self._what}: a row names a place that isn't the start of a block")
        if (slots < self._start).any():
            self._late = True
        here = (slots >= self._start) & (slots < self._start + self._slots)
        at = slots[here] - self._start
        size, checksum = (sizes[here] // self._slot_units).astype("u1"), checksums[here]
        before, seen = self._sizes[at], slots[here] < self._have
        differs = (before != 0) & ((before != size) | (self._checksums[at] != checksum))
        if differs.any() or (seen & (before == 0)).any():
            raise RemoteProtocolError(f"{self._what}: a row names contents that aren't those at its place")
        self._sizes[at], self._checksums[at] = size, checksum
        if (self._sizes[at] != size).any() or (self._checksums[at] != checksum).any():
            raise RemoteProtocolError(f"{self._what}: two rows name different contents at one place")

    def verify(self, payload: memoryview, have_units: int) -> None:
        """Compares whole blocks that stand at `have_units` with the rows that named them.

        Raises:
            RemoteProtocolError: they weren't named, aren't whole blocks, or differ.
        """
        slot_bytes = self._slot_units * UNIT_BYTES
        first = have_units // self._slot_units
        count, rest = divmod(len(payload), slot_bytes)
        if rest:
            raise RemoteProtocolError(f"{self._what}: contents that aren't whole blocks")
        if first < self._start or first + count > self._start + self._slots:
            self._move(first)
        begin = first - self._start
        sizes = self._sizes[begin : begin + count]
        starts = np.flatnonzero(sizes)
        lengths = sizes[starts].astype("<i8")
        ends = starts + lengths
        if not len(starts) or starts[0] or ends[-1] != count or (starts[1:] != ends[:-1]).any():
            raise RemoteProtocolError(
                f"{self._what}: contents at byte {have_units * UNIT_BYTES} that no row named, "
                f"or that aren't whole blocks"
            )
        wanted = self._checksums[begin + starts].tolist()
        for start, end, checksum in zip(
            (starts * slot_bytes).tolist(), (ends * slot_bytes).tolist(), wanted, strict=True
        ):
            if xxh3_64_intdigest(payload[start:end]) != checksum:
                at = have_units * UNIT_BYTES + start
                raise RemoteProtocolError(f"{self._what}: the block at byte {at} doesn't match its checksum")
        self._have = first + count

    def _move(self, start: int) -> None:
        """Moves the window to `start`, up to which contents were verified."""
        self._start = self._have = start
        self._sizes = np.zeros(self._slots, "u1")  # anew: pages that aren't touched aren't there
        self._checksums = np.zeros(self._slots, "<u8")
        for units, sizes, checksums in self._reread(
            start * self._slot_units, (start + self._slots) * self._slot_units
        ):
            inside = (units >= start * self._slot_units) & (units < (start + self._slots) * self._slot_units)
            self.add((units[inside], sizes[inside], checksums[inside]))

    def finish(self, others: Callable[[], Iterator[Rows]] | None = None) -> None:
        """Checks, once all has come, what couldn't be checked before; goes over the section window by window.

        Args:
            others: yields rows of another section that name contents of this one (and may not add to them).

        Raises:
            RemoteProtocolError: as `add`.
        """
        if not self._late and others is None:
            return
        have, carry, start = self._have, 0, 0
        while start < have:
            self._move(start)
            count = min(self._slots, have - start)
            begins = np.flatnonzero(self._sizes[:count])
            ends = np.append(carry, begins + self._sizes[begins])
            if (begins != ends[:-1]).any():
                raise RemoteProtocolError(f"{self._what}: a row names a place in the middle of a block")
            carry, start = int(ends[-1]) - count, start + count
            for rows in others() if others else ():
                self._compare(rows)

    def _compare(self, rows: Rows) -> None:
        slots, rest = np.divmod(rows[0].astype("<i8"), self._slot_units)
        inside = (slots >= self._start) & (slots < self._start + self._slots)
        at = slots[inside] - self._start
        same = (self._sizes[at] == rows[1][inside] // self._slot_units) & (
            self._checksums[at] == rows[2][inside]
        )
        if rest.any() or not same.all():
            raise RemoteProtocolError(f"{self._what}: a row of the journal names contents that aren't there")
