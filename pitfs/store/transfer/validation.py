"""The rows of a transfer, checked as they arrive: what a peer sends is believed only where it was looked at.

Each check takes the next rows of its section (in frames of any size), and keeps of those before only what the
next ones must follow: the last key, a count, a place.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from pitfs.errors import RemoteProtocolError
from pitfs.model.group import is_name
from pitfs.model.ladder import is_rung
from pitfs.model.transfer import MAX_JOURNAL_RUNS, UNIT_BYTES, Manifest, Source, TransferKind, VolumeInfo
from pitfs.store.objects.format import MAX_SEQ, MAX_UNITS

RowArray = npt.NDArray[np.void]  # DIFF_ENTRY, JOURNAL_ENTRY or POSITION
_EMPTY: Final = -1
_MAX_BLOCK_UNITS: Final = 128
_OF_DIFF: Final = (Source.ZERO, Source.FOURTH, Source.SHARED_FOURTH)


def refuse(section: str, problem: str) -> RemoteProtocolError:
    return RemoteProtocolError(f"the transfer's {section}: {problem}; nothing of it is applied")


class _Volumes:
    """Vectorised facts about the group's volumes."""

    def __init__(self, volumes: Sequence[VolumeInfo]) -> None:
        self.count = len(volumes)
        self.block_counts = np.array([volume.block_count for volume in volumes], "<u8")
        self.block_units = np.array([volume.block_size // UNIT_BYTES for volume in volumes], "<u8")

    def check(self, section: str, rows: RowArray, sources: Sequence[Source]) -> None:
        """Refuses rows outside of the group's volumes, and those that say what they may not."""
        volume, shared = rows["volume"], rows["source"] >= Source.SHARED_FOURTH
        if (volume >= self.count).any():
            raise refuse(section, f"volume {int(volume.max())} of {self.count}")
        if (rows["block"] >= self.block_counts[volume]).any():
            raise refuse(section, "a block behind the end of its volume")
        if not np.isin(rows["source"], sources).all() or rows["reserved"].any():
            raise refuse(section, "a source that this pitfs doesn't know")
        if (rows["unit"] >= MAX_UNITS - _MAX_BLOCK_UNITS).any():
            raise refuse(section, "a place behind the 32 TiB that one object can have")
        if rows["unit"][~shared].any():
            raise refuse(section, "a place that the replica finds by itself")

    def own_units(self, rows: RowArray, own: Source) -> int:
        """What the contents take that come with these rows."""
        return int(self.block_units[rows["volume"][rows["source"] == own]].sum())

    def own_ends(self, rows: RowArray, own: Source) -> npt.NDArray[np.uint64]:
        """What the contents take that come with each row and those before it, in units."""
        return np.cumsum(np.where(rows["source"] == own, self.block_units[rows["volume"]], 0), dtype="<u8")

    def ends_of_shared(self, rows: RowArray) -> npt.NDArray[np.uint64]:
        """The unit at which the content of each of these rows ends."""
        ends: npt.NDArray[np.uint64] = rows["unit"] + self.block_units[rows["volume"]]
        return ends


def _begins(keys: Sequence[npt.NDArray[np.generic]], last: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Which rows, by these key columns, first column first, don't come after the one before; `last` is before all."""
    after: npt.NDArray[np.bool_] | None = None
    for column, before in zip(reversed(keys), reversed(last), strict=True):
        values = np.concatenate([np.array([before], "<i8"), column.astype("<i8")])
        greater, equal = values[1:] > values[:-1], values[1:] == values[:-1]
        after = greater if after is None else greater | (equal & after)
    return np.flatnonzero(~after) if after is not None else np.zeros(0, "<i8")


class DiffCheck:
    """DIFF: strictly ascending by (volume, block)."""

    def __init__(self, volumes: Sequence[VolumeInfo], manifest: Manifest) -> None:
        self._volumes = _Volumes(volumes)
        self._limit = manifest.diff_count
        self._last = (_EMPTY, _EMPTY)
        self.count = 0
        self.units = 0  # of contents named so far
        self.shared = 0  # rows that share one

    def take(self, rows: RowArray) -> None:
        """Checks the next rows.

        Raises:
            RemoteProtocolError: they can't be.
        """
        self._volumes.check("diff", rows, _OF_DIFF)
        if len(_begins((rows["volume"], rows["block"]), self._last)):
            raise refuse("diff", "rows that don't strictly ascend by volume and block")
        self.count += len(rows)
        if self._limit is not None and self.count > self._limit:
            raise refuse("diff", f"more than the {self._limit} rows announced")
        ends = self.units + self._volumes.own_ends(rows, Source.FOURTH)
        shared = rows["source"] == Source.SHARED_FOURTH
        self.shared += int(shared.sum())
        if (self._volumes.ends_of_shared(rows[shared]) > ends[shared]).any():
            raise refuse("diff", "a row shares a content that no row before it brings")
        self.units = int(ends[-1]) if len(ends) else self.units
        if len(rows):
            self._last = (int(rows["volume"][-1]), int(rows["block"][-1]))


class Run(NamedTuple):
    """Where rows of JOURNAL begin that ascend: which row it is, which block and unit of JOURNAL_BLOCKS comes next.

    `shared`: how many rows before it share a content.
    """

    row: int
    block: int
    unit: int
    shared: int


class JournalCheck:
    """JOURNAL: runs that strictly ascend by (volume, block, seq), seq inside the interval.

    Attributes:
        runs: where each begins, as far as the rows tell.
    """

    def __init__(self, volumes: Sequence[VolumeInfo], manifest: Manifest) -> None:
        self._volumes = _Volumes(volumes)
        self._manifest = manifest
        self._last = (_EMPTY, _EMPTY, _EMPTY)
        self.count = 0
        self.blocks = 0  # of contents named so far
        self.units = 0
        self.shared = 0  # rows that share one
        self.runs = [Run(0, 0, 0, 0)]

    def take(self, rows: RowArray) -> None:
        """As DiffCheck."""
        self._volumes.check("journal", rows, tuple(Source))
        seq = rows["seq"]
        if ((seq <= self._manifest.from_seq) | (seq > self._manifest.to_seq)).any():
            raise refuse("journal", f"a seq outside of ({self._manifest.from_seq}, {self._manifest.to_seq}]")
        if self.count + len(rows) > self._manifest.journal_count:
            raise refuse("journal", f"more than the {self._manifest.journal_count} rows announced")
        begins = set(_begins((rows["volume"], rows["block"], seq), self._last).tolist())
        for start, end in itertools.pairwise(sorted({0, *begins, len(rows)})):
            self._take_run(rows[start:end], start in begins)
        if len(rows):
            self._last = (int(rows["volume"][-1]), int(rows["block"][-1]), int(seq[-1]))

    def _take_run(self, rows: RowArray, begins: bool) -> None:
        if begins:
            self.runs.append(Run(self.count, self.blocks, self.units, self.shared))
            if len(self.runs) > MAX_JOURNAL_RUNS:
                raise refuse("journal", "rows that don't ascend by volume, block and seq")
        self.count += len(rows)
        self.blocks += int((rows["source"] == Source.JOURNAL).sum())
        self.units += self._volumes.own_units(rows, Source.JOURNAL)
        self.shared += int((rows["source"] >= Source.SHARED_FOURTH).sum())


class BlockSizes:
    """Sizes of the blocks of contents that come next, as rows name them.

    Args:
        batches: int64 each, bytes; None among them: no more have been named yet.
    """

    def __init__(self, batches: Iterator[npt.NDArray[np.int64] | None]) -> None:
        self._batches = batches
        self._left = np.zeros(0, "<i8")

    def next(self, total_bytes: int) -> npt.NDArray[np.int64] | None:
        """Those that make up `total_bytes`; None if none do."""
        while int(self._left.sum()) < total_bytes:
            batch = next(self._batches)
            if batch is None:
                return None
            self._left = np.concatenate([self._left, batch])
        ends = np.cumsum(self._left)
        count = int(np.searchsorted(ends, total_bytes)) + 1
        if ends[count - 1] != total_bytes:
            return None
        sizes, self._left = self._left[:count], self._left[count:]
        return sizes

    def skip(self, count: int) -> int:
        """Passes over so many blocks; returns their bytes, -1 if there aren't so many."""
        passed = 0
        while count:
            if not len(self._left):
                batch = next(self._batches)
                if batch is None:
                    return -1
                self._left = batch
            passed += int(self._left[:count].sum())
            count, self._left = count - min(count, len(self._left)), self._left[count:]
        return passed


class PositionsCheck:
    """POSITIONS: strictly ascending inside the interval; with those before, see `PositionsInOrder`."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._last = manifest.from_seq, manifest.from_time_ns
        self.count = 0

    def take(self, positions: RowArray) -> None:
        """As DiffCheck."""
        if not len(positions):
            return
        m, (last_seq, last_ns) = self._manifest, self._last
        seq = np.concatenate([np.array([last_seq], "<i8"), positions["seq"].astype("<i8")])
        times_ns = np.concatenate([np.array([last_ns], "<i8"), positions["time_ns"]])
        if not ((seq[1:] > seq[:-1]).all() and (times_ns[1:] > times_ns[:-1]).all()):
            raise refuse("positions", "positions that don't strictly ascend")
        if m.first_time_ns is None or times_ns[1] < m.first_time_ns:
            raise refuse("positions", "a first time other than announced")
        self.count += len(positions)
        self._last = int(seq[-1]), int(times_ns[-1])
        if self._last[0] > m.to_seq or self._last[1] > m.to_time_ns:
            raise refuse("positions", "positions behind the interval's end")
        if self.count > m.position_count:
            raise refuse("positions", f"more than the {m.position_count} announced")


class PositionsInOrder:
    """All positions of an interval on its rung, ascending: all writes, or the ends of granules but the last."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._last = manifest.from_seq, manifest.from_time_ns
        self._count = 0

    def take(self, seqs: npt.NDArray[np.int64], times_ns: npt.NDArray[np.int64]) -> None:
        """Checks the next positions.

        Raises:
            RemoteProtocolError: they can't be.
        """
        m, rung_ns = self._manifest, self._manifest.granularity_ns
        seqs = np.concatenate([np.array([self._last[0]], "<i8"), seqs])
        times_ns = np.concatenate([np.array([self._last[1]], "<i8"), times_ns])
        if not ((seqs[1:] > seqs[:-1]).all() and (times_ns[1:] > times_ns[:-1]).all()):
            raise refuse("positions", "positions that don't fit to those that came before")
        if rung_ns:
            granules = times_ns[(0 if self._count else 1) :] // rung_ns
            if (granules[1:] == granules[:-1]).any() or granules[-1] >= m.to_time_ns // rung_ns:
                raise refuse("positions", f"positions that aren't the ends of granules of {rung_ns} ns")
        elif (seqs[1:] != seqs[:-1] + 1).any():
            raise refuse("positions", "a write without its position")
        self._count += len(seqs) - 1
        self._last = int(seqs[-1]), int(times_ns[-1])

    def finish(self) -> None:
        m = self._manifest
        if not m.granularity_ns and self._last != (m.to_seq, m.to_time_ns):
            raise refuse("positions", "a last one other than announced")


def check_manifest(manifest: Manifest, volumes: Sequence[VolumeInfo]) -> None:
    """What a manifest must fulfil by itself.

    Raises:
        RemoteProtocolError: it doesn't.
    """
    m = manifest
    empty = m.to_seq == m.from_seq and m.kind is TransferKind.INTERVAL
    numbers = (
        m.from_seq,
        m.to_seq,
        m.from_time_ns,
        m.to_time_ns,
        m.protected_through_ns,
        m.mark,
        m.journal_count,
        m.position_count,
        m.base_bytes,
    )
    problem = None
    if any(not 0 <= n < 1 << 62 for n in (*numbers, m.first_time_ns or 0, m.diff_count or 0)):
        problem = "a number out of range"
    elif m.to_seq > MAX_SEQ:
        problem = f"seq {m.to_seq}: a store has room for {MAX_SEQ} writes"
    elif m.to_seq < m.from_seq or (m.to_seq == m.from_seq) != (m.to_time_ns == m.from_time_ns):
        problem = "positions that don't go forward"
    elif m.to_time_ns < m.from_time_ns or m.protected_through_ns < m.to_time_ns:
        problem = "times that don't go forward"
    elif m.first_time_ns is not None and not m.from_time_ns <= m.first_time_ns <= m.to_time_ns:
        problem = "a first time outside of the interval"
    elif m.kind is TransferKind.LAYERS:
        problem = _problem_of_layers(m)
    elif (m.granularity_ns, m.base_granularity_ns) != (None, None) or m.journal_count or m.position_count:
        problem = "a journal where only the snapshot is announced"
    elif m.kind is TransferKind.CHANGES and m.to_seq == m.from_seq:
        problem = "changes that lead nowhere"
    elif empty and m.diff_count:
        problem = "rows where nothing was written"
    elif m.diff_count is not None and m.diff_count > sum(volume.block_count for volume in volumes):
        problem = "more rows than blocks"
    for bookmark in m.bookmarks:
        name = bookmark.name
        if not is_name(name):
            problem = f"bookmark {name[:80]!r}: must be 1 to 64 of A-Z a-z 0-9 . _ -"
        elif (bookmark.seq, bookmark.time_ns) != (m.to_seq, m.to_time_ns):
            problem = f"bookmark {name!r} isn't at the position that the transfer leads to"
    for gap in m.gaps:
        if not (
            0 <= gap.from_time_ns <= gap.to_time_ns < 1 << 62 and 0 <= gap.from_seq <= gap.to_seq < 1 << 62
        ):
            problem = "a gap that ends before it begins"
    if problem:
        raise refuse("manifest", problem)


def _problem_of_layers(m: Manifest) -> str | None:
    base_ns = m.base_granularity_ns
    if base_ns == m.granularity_ns and (m.journal_count or m.position_count):
        return "rows where only another cause is announced"
    if base_ns is m.granularity_ns is None:
        return None
    for granularity_ns in (m.granularity_ns, m.granularity_ns if base_ns is None else base_ns):
        if granularity_ns is None or not is_rung(granularity_ns):
            return f"granularity {granularity_ns} ns: isn't a rung of the ladder that this pitfs knows"
    if m.to_seq == m.from_seq:
        return "layers where nothing was written"
    if base_ns is not None and m.granularity_ns is not None and base_ns < m.granularity_ns:
        return f"granularity {m.granularity_ns} ns, coarser than the {base_ns} ns before it"
    if m.position_count > m.to_seq - m.from_seq or m.diff_count or m.bookmarks or m.gaps:
        return f"{m.position_count} positions of {m.to_seq - m.from_seq} writes, or what isn't part of a journal"
    return None
