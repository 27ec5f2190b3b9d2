"""The rows of a transfer, checked as they arrive: what a peer sends is believed only where it was looked at.

Each check takes the next rows of its section (in frames of any size), and keeps of those before only what the
next ones must follow: the last key, a count, a place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pitfs.errors import RemoteProtocolError
from pitfs.model.ladder import is_rung
from pitfs.model.transfer import UNIT_BYTES, Kind, Manifest, Source, VolumeInfo
from pitfs.store.expected import Rows
from pitfs.store.layout import MAX_SEQ, MAX_UNITS, is_name

RowArray = npt.NDArray[np.void]  # DIFF_ENTRY or JOURNAL_ENTRY
_EMPTY = -1


def refuse(section: str, problem: str) -> RemoteProtocolError:
    return RemoteProtocolError(f"the transfer's {section}: {problem}; nothing of it is applied")


class _Volumes:
    """Vectorised facts about the group's volumes."""

    def __init__(self, volumes: Sequence[VolumeInfo]) -> None:
        self.count = len(volumes)
        self.block_counts = np.array([volume.block_count for volume in volumes], "<u8")
        self.block_units = np.array([volume.block_size // UNIT_BYTES for volume in volumes], "<u8")

    def sizes_in_units(self, section: str, rows: RowArray, sources: int) -> npt.NDArray[np.uint64]:
        """Size of each row's block in units; refuses rows outside of the group's volumes."""
        volume = rows["volume"]
        if (volume >= self.count).any():
            raise refuse(section, f"volume {int(volume.max())} of {self.count}")
        if (rows["block"] >= self.block_counts[volume]).any():
            raise refuse(section, "a block behind the end of its volume")
        if (rows["source"] >= sources).any() or rows["reserved"].any():
            raise refuse(section, "a source that this pitfs doesn't know")
        if (rows["unit"] >= MAX_UNITS - 128).any():
            raise refuse(section, "a place behind the 32 TiB that one object can have")
        if rows["unit"][rows["source"] == Source.ZERO].any():
            raise refuse(section, "a block of zeros that has a place")
        units: npt.NDArray[np.uint64] = self.block_units[volume]
        return units


def _ascends(keys: Sequence[npt.NDArray[np.generic]], last: tuple[int, ...]) -> bool:
    """Whether the rows with these key columns, first column first, strictly ascend, and from `last` on."""
    after: npt.NDArray[np.bool_] | None = None
    for column, before in zip(reversed(keys), reversed(last), strict=True):
        values = np.concatenate([np.array([before], "<i8"), column.astype("<i8")])
        greater, equal = values[1:] > values[:-1], values[1:] == values[:-1]
        after = greater if after is None else greater | (equal & after)
    return bool(after is None or after.all())


class DiffCheck:
    """DIFF: strictly ascending by (volume, block); contents stand in the order of the rows, without holes."""

    def __init__(self, volumes: Sequence[VolumeInfo], manifest: Manifest) -> None:
        self._volumes = _Volumes(volumes)
        self._limit = manifest.diff_count
        self._last = (_EMPTY, _EMPTY)
        self.count = 0
        self.units = 0  # of contents named so far

    def take(self, rows: RowArray) -> Rows:
        """Checks the next rows, returns those that name contents.

        Raises:
            RemoteProtocolError: they can't be.
        """
        units = self._volumes.sizes_in_units("diff", rows, Source.FOURTH + 1)
        if not _ascends((rows["volume"], rows["block"]), self._last):
            raise refuse("diff", "rows that don't strictly ascend by volume and block")
        stored = rows["source"] == Source.FOURTH
        sizes = units[stored]
        ends = self.units + np.cumsum(sizes, dtype="<u8")
        if (rows["unit"][stored] != ends - sizes).any():
            raise refuse("diff", "contents that don't stand in the order of the rows")
        self.count += len(rows)
        if self._limit is not None and self.count > self._limit:
            raise refuse("diff", f"more than the {self._limit} rows announced")
        if len(ends):
            self.units = int(ends[-1])
        if len(rows):
            self._last = (int(rows["volume"][-1]), int(rows["block"][-1]))
        return rows["unit"][stored], sizes, rows["checksum"][stored]


class JournalCheck:
    """JOURNAL: strictly ascending by (volume, block, seq), seq inside the interval."""

    def __init__(self, volumes: Sequence[VolumeInfo], manifest: Manifest) -> None:
        self._volumes = _Volumes(volumes)
        self._manifest = manifest
        self._last = (_EMPTY, _EMPTY, _EMPTY)
        self.count = 0

    def take(self, rows: RowArray) -> Rows:
        """As DiffCheck; returns the rows that name contents of the journal's own."""
        units = self._volumes.sizes_in_units("journal", rows, Source.JOURNAL + 1)
        seq = rows["seq"]
        if ((seq <= self._manifest.from_seq) | (seq > self._manifest.to_seq)).any():
            raise refuse("journal", f"a seq outside of ({self._manifest.from_seq}, {self._manifest.to_seq}]")
        if not _ascends((rows["volume"], rows["block"], seq), self._last):
            raise refuse("journal", "rows that don't strictly ascend by volume, block and seq")
        self.count += len(rows)
        if self.count > self._manifest.journal_count:
            raise refuse("journal", f"more than the {self._manifest.journal_count} rows announced")
        if len(rows):
            self._last = (int(rows["volume"][-1]), int(rows["block"][-1]), int(seq[-1]))
        return self.named(rows, Source.JOURNAL, units)

    def named(self, rows: RowArray, source: Source, units: npt.NDArray[np.uint64] | None = None) -> Rows:
        """The rows of that source: places, sizes in units, checksums."""
        chosen = rows["source"] == source
        sizes = self._volumes.block_units[rows["volume"][chosen]] if units is None else units[chosen]
        return rows["unit"][chosen], sizes, rows["checksum"][chosen]


class PositionsCheck:
    """POSITIONS: strictly ascending inside the interval; all writes, or the ends of granules but the last."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._last = manifest.from_seq, manifest.from_time_ns
        self.count = 0

    def take(self, positions: RowArray) -> None:
        """Checks the next positions.

        Raises:
            RemoteProtocolError: they can't be.
        """
        if not len(positions):
            return
        m, (last_seq, last_ns) = self._manifest, self._last
        seq = np.concatenate([np.array([last_seq], "<i8"), positions["seq"].astype("<i8")])
        times_ns = np.concatenate([np.array([last_ns], "<i8"), positions["time_ns"]])
        if not ((seq[1:] > seq[:-1]).all() and (times_ns[1:] > times_ns[:-1]).all()):
            raise refuse("positions", "positions that don't strictly ascend")
        if self.count == 0:
            self._check_first(int(times_ns[1]))
        rung_ns = m.granularity_ns
        if rung_ns:
            granules = times_ns[(0 if self.count else 1) :] // rung_ns
            if (granules[1:] == granules[:-1]).any() or granules[-1] >= m.to_time_ns // rung_ns:
                raise refuse("positions", f"positions that aren't the ends of granules of {rung_ns} ns")
        elif (seq[1:] != seq[:-1] + 1).any():
            raise refuse("positions", "a write without its position")
        self.count += len(positions)
        self._last = int(seq[-1]), int(times_ns[-1])
        if self._last[0] > m.to_seq or self._last[1] > m.to_time_ns:
            raise refuse("positions", "positions behind the interval's end")
        if self.count > m.position_count:
            raise refuse("positions", f"more than the {m.position_count} announced")
        if not rung_ns and self.count == m.position_count and self._last != (m.to_seq, m.to_time_ns):
            raise refuse("positions", "a last one other than announced")

    def _check_first(self, first_ns: int) -> None:
        m = self._manifest
        if m.first_time_ns is None or first_ns < m.first_time_ns:
            raise refuse("positions", "a first time other than announced")
        if m.granularity_ns == 0 and first_ns != m.first_time_ns:
            raise refuse("positions", "a first time other than announced")


def check_manifest(manifest: Manifest, volumes: Sequence[VolumeInfo]) -> None:
    """What a manifest must fulfil by itself.

    Raises:
        RemoteProtocolError: it doesn't.
    """
    m = manifest
    empty = m.to_seq == m.from_seq and m.kind is Kind.INTERVAL
    numbers = (
        m.from_seq,
        m.to_seq,
        m.from_time_ns,
        m.to_time_ns,
        m.protected_through_ns,
        m.mark,
        m.journal_count,
        m.position_count,
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
    elif m.granularity_ns is not None and not is_rung(m.granularity_ns):
        problem = f"granularity {m.granularity_ns} ns: isn't a rung of the ladder that this pitfs knows"
    elif not has_journal(m) and (m.journal_count or m.position_count):
        problem = "a journal where only the snapshot is announced"
    elif has_journal(m) and not (m.position_count if m.granularity_ns else m.position_count == m.to_seq - m.from_seq):
        problem = f"{m.position_count} positions of {m.to_seq - m.from_seq} writes"
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


def has_journal(manifest: Manifest) -> bool:
    """Whether the transfer brings a difference journal."""
    return (
        manifest.kind is Kind.INTERVAL
        and manifest.granularity_ns is not None
        and manifest.to_seq > manifest.from_seq
    )
