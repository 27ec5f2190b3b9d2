"""The rows of a transfer, checked as they arrive: what a peer sends is believed only where it was looked at.

Each check takes the next rows of its section (in frames of any size), and keeps of those before only what the
next ones must follow: the last key, a count, a place.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from pitfs.errors import RemoteProtocolError
from pitfs.model.blockmap import I64Array, U64Array
from pitfs.model.digest import are_digests
from pitfs.model.group import NAME_RULE, is_name
from pitfs.model.ladder import is_rung
from pitfs.model.transfer import MAX_JOURNAL_RUNS, UNIT_BYTES, Manifest, Source, TransferKind, VolumeInfo
from pitfs.store.index.merge import BY_BLOCK, Rows
from pitfs.store.objects.format import MAX_SEQ, Layout

_MAX_BLOCK_UNITS: Final = 128


def refuse(section: str, problem: str) -> RemoteProtocolError:
    return RemoteProtocolError(f"the transfer's {section}: {problem}; nothing of it is applied")


class Run(NamedTuple):
    """Where rows of JOURNAL begin that ascend: which row it is, which block and unit of JOURNAL_BLOCKS comes next.

    `shared`: how many rows before it share a content.
    """

    row: int
    block: int
    unit: int
    shared: int


class _BlockRowsCheck:
    """What DIFF and JOURNAL have in common: rows name blocks, and contents that come with them or are shared.

    Args:
        own: source of rows whose content comes with them; sources: all that there may be.
        keys: by which the rows ascend.
        limit: of rows, None if not announced.
        layout: of the store.

    Attributes:
        count: of rows so far; shared: of those that share a content.
        blocks, units: of contents that come with them.
    """

    def __init__(
        self, name: str, own: Source, sources: Sequence[Source], keys: Sequence[str], volumes: Sequence[VolumeInfo],
        limit: int | None, layout: Layout,
    ) -> None:  # fmt: skip
        self._wire_units, self._max_units = layout.wire_units, layout.max_units * layout.wire_units
        self._name, self.own, self._sources, self._keys, self._limit = name, own, sources, keys, limit
        self._block_counts = np.array([volume.block_count for volume in volumes], "<u8")
        self._block_units = np.array([volume.block_size // UNIT_BYTES for volume in volumes], "<u8")
        self._last = (-1,) * len(keys)  # keys of the last row; these come before any
        self.count = self.blocks = self.units = self.shared = 0

    def _check(self, rows: Rows) -> list[int]:
        """Refuses rows outside of the group's volumes, and those that say what they may not.

        Returns:
            numbers of the rows that don't come after the one before them.
        """
        volume, shared = rows["volume"], rows["source"] >= Source.SHARED_SNAPSHOT
        if (volume >= len(self._block_counts)).any():
            raise refuse(self._name, f"volume {int(volume.max())} of {len(self._block_counts)}")
        if (rows["block"] >= self._block_counts[volume]).any():
            raise refuse(self._name, "a block behind the end of its volume")
        if not np.isin(rows["source"], self._sources).all() or rows["reserved"].any():
            raise refuse(self._name, "a source that this pitfs doesn't know")
        if (rows["unit"] >= self._max_units - _MAX_BLOCK_UNITS).any() or (rows["unit"] % self._wire_units).any():
            raise refuse(self._name, "a place inside a block, or behind what one object can have")
        if rows["unit"][~shared].any():
            raise refuse(self._name, "a place that the replica finds by itself")
        after = np.zeros(len(rows), np.bool_)
        for key, last in zip(reversed(self._keys), reversed(self._last), strict=True):
            values = np.concatenate([np.array([last], "<i8"), rows[key].astype("<i8")])
            after = (values[1:] > values[:-1]) | ((values[1:] == values[:-1]) & after)
        if len(rows):
            self._last = tuple(int(rows[key][-1]) for key in self._keys)
        return np.flatnonzero(~after).tolist()

    def _units(self, rows: Rows) -> U64Array:
        """What the content takes that comes with each row, 0 where none does."""
        return np.where(rows["source"] == self.own, self._block_units[rows["volume"]], 0).astype("<u8")

    def _add(self, rows: Rows) -> None:
        self.count += len(rows)
        if self._limit is not None and self.count > self._limit:
            raise refuse(self._name, f"more than the {self._limit} rows announced")
        self.blocks += int((rows["source"] == self.own).sum())
        self.units += int(self._units(rows).sum())
        self.shared += int((rows["source"] >= Source.SHARED_SNAPSHOT).sum())


class DiffCheck(_BlockRowsCheck):
    """DIFF: strictly ascending by (volume, block)."""

    def __init__(self, volumes: Sequence[VolumeInfo], manifest: Manifest, layout: Layout) -> None:
        sources = Source.ZERO, Source.SNAPSHOT, Source.SHARED_SNAPSHOT
        super().__init__("diff", Source.SNAPSHOT, sources, ("volume", "block"), volumes, manifest.diff_count, layout)

    def take(self, rows: Rows) -> None:
        """Checks the next rows. Raises RemoteProtocolError: they are invalid."""
        if self._check(rows):
            raise refuse("diff", "rows that don't strictly ascend by volume and block")
        come = self.units + np.cumsum(self._units(rows), dtype="<u8")
        ends = rows["unit"] + self._block_units[rows["volume"]]
        if (ends > come)[rows["source"] == Source.SHARED_SNAPSHOT].any():
            raise refuse("diff", "a row shares a content that no row before it brings")
        self._add(rows)


class JournalCheck(_BlockRowsCheck):
    """JOURNAL: runs that strictly ascend by (volume, block, seq), seq inside the interval.

    Attributes:
        runs: where each begins, as far as the rows tell.
    """

    def __init__(self, volumes: Sequence[VolumeInfo], manifest: Manifest, layout: Layout) -> None:
        super().__init__("journal", Source.JOURNAL, tuple(Source), BY_BLOCK, volumes, manifest.journal_count, layout)
        self._from_seq, self._to_seq = manifest.from_seq, manifest.to_seq
        self.runs = [Run(0, 0, 0, 0)]

    def take(self, rows: Rows) -> None:
        """As DiffCheck."""
        begins = self._check(rows)
        if ((rows["seq"] <= self._from_seq) | (rows["seq"] > self._to_seq)).any():
            raise refuse("journal", f"a seq outside of ({self._from_seq}, {self._to_seq}]")
        for start, end in itertools.pairwise(sorted({0, *begins, len(rows)})):
            if start in begins:
                self.runs.append(Run(self.count, self.blocks, self.units, self.shared))
                if len(self.runs) > MAX_JOURNAL_RUNS:
                    raise refuse("journal", "rows that don't ascend by volume, block and seq")
            self._add(rows[start:end])


class _AscendingPositions:
    """Positions behind the interval's base snapshot. `count`: of those so far."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._last = manifest.from_seq, manifest.from_time_ns
        self.count = 0

    def _ascending(self, rows: Rows, problem: str) -> tuple[I64Array, I64Array]:
        """The seqs and times of the next positions, the one before them first. Refuses them where they don't ascend."""
        seqs = np.concatenate([np.array([self._last[0]], "<i8"), rows["seq"].astype("<i8")])
        times_ns = np.concatenate([np.array([self._last[1]], "<i8"), rows["time_ns"]])
        if not ((seqs[1:] > seqs[:-1]).all() and (times_ns[1:] > times_ns[:-1]).all()):
            raise refuse("positions", problem)
        self._last = int(seqs[-1]), int(times_ns[-1])
        self.count += len(rows)
        return seqs, times_ns


class PositionsCheck(_AscendingPositions):
    """POSITIONS: strictly ascending inside the interval; with those before, see `PositionsInOrder`."""

    def take(self, rows: Rows) -> None:
        """As DiffCheck."""
        if not len(rows):
            return
        m = self._manifest
        _, times_ns = self._ascending(rows, "positions that don't strictly ascend")
        if m.first_time_ns is None or times_ns[1] < m.first_time_ns:
            raise refuse("positions", "a first time other than announced")
        if self._last[0] > m.to_seq or self._last[1] > m.to_time_ns:
            raise refuse("positions", "positions behind the interval's end")
        if self.count > m.position_count:
            raise refuse("positions", f"more than the {m.position_count} announced")


class PositionsInOrder(_AscendingPositions):
    """All positions of an interval on its rung, ascending: all writes, or the ends of granules but the last."""

    def take(self, rows: Rows) -> None:
        """Checks the next positions, at least one. Raises RemoteProtocolError: they are invalid."""
        m, rung_ns, is_first = self._manifest, self._manifest.granularity_ns, not self.count
        seqs, times_ns = self._ascending(rows, "positions that don't fit to those that came before")
        if rung_ns:
            granules = times_ns[is_first:] // rung_ns  # the base snapshot may lie in the first one's granule
            if (granules[1:] == granules[:-1]).any() or granules[-1] >= m.to_time_ns // rung_ns:
                raise refuse("positions", f"positions that aren't the ends of granules of {rung_ns} ns")
        elif (seqs[1:] != seqs[:-1] + 1).any():
            raise refuse("positions", "a write without its position")

    def finish(self) -> None:
        m = self._manifest
        if not m.granularity_ns and self._last != (m.to_seq, m.to_time_ns):
            raise refuse("positions", "a last one other than announced")


BlockCheck = DiffCheck | JournalCheck  # of rows that name contents
RowCheck = BlockCheck | PositionsCheck


def check_manifest(manifest: Manifest, volumes: Sequence[VolumeInfo]) -> None:
    """What a manifest must fulfil by itself. Raises RemoteProtocolError: it doesn't."""
    m = manifest
    layers = m.kind is TransferKind.LAYERS
    numbers = (
        m.mark, m.from_seq, m.to_seq, m.from_time_ns, m.to_time_ns, m.first_time_ns or 0, m.protected_through_ns,
        m.diff_count or 0, m.journal_count, m.position_count, m.base_bytes,
    )  # fmt: skip
    nothing = m.to_seq == m.from_seq
    has_journal = (m.granularity_ns, m.base_granularity_ns) != (None, None) or m.journal_count or m.position_count
    first_ns = m.from_time_ns if m.first_time_ns is None else m.first_time_ns
    refused = (
        (any(not 0 <= number < 1 << 62 for number in numbers), "a number out of range"),
        (m.to_seq > MAX_SEQ, f"seq {m.to_seq}: a store has room for {MAX_SEQ} writes"),
        (m.to_seq < m.from_seq or nothing != (m.to_time_ns == m.from_time_ns), "positions that don't go forward"),
        (not m.from_time_ns <= m.to_time_ns <= m.protected_through_ns, "times that don't go forward"),
        (not m.from_time_ns <= first_ns <= m.to_time_ns, "a first time outside of the interval"),
        (not layers and has_journal, "a journal where only the snapshot is announced"),
        (m.kind is TransferKind.CHANGES and nothing, "changes that lead nowhere"),
        (m.kind is TransferKind.INTERVAL and nothing and m.diff_count, "rows where nothing was written"),
        (not are_digests(m.digests, len(volumes)), "digests that aren't one of each volume"),
        (not layers and (m.diff_count or 0) > sum(volume.block_count for volume in volumes), "more rows than blocks"),
    )
    problem = next((text for is_refused, text in refused if is_refused), None)
    if layers and problem is None:
        problem = _problem_of_layers(m)
    for bookmark in m.bookmarks:
        name = bookmark.name
        if not is_name(name):
            problem = f"bookmark {name[:80]!r}: must be {NAME_RULE}"
        elif (bookmark.seq, bookmark.time_ns) != (m.to_seq, m.to_time_ns):
            problem = f"bookmark {name!r} isn't at the position that the transfer leads to"
    for gap in m.gaps:
        if not (0 <= gap.from_time_ns <= gap.to_time_ns < 1 << 62 and 0 <= gap.from_seq <= gap.to_seq < 1 << 62):
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
