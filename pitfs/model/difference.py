"""An interval's writes → snapshot diff and difference journal (figures 6B and 9). Pure.

The journal's records come as columns with a row for each block of each write, in the order of writing. The
snapshot diff is the last row of each block; a content that several blocks end with is in it once. The difference
journal is all rows, each coming with a layer, and carries data only where neither the diff, nor zeros, nor another
row of the same transfer has the same content.
Equal checksums make rows candidates for that; the bytes decide (invariant 6).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from pitfs.model.ladder import RUNGS_NS, layers_of
from pitfs.model.transfer import DIFF_ENTRY, JOURNAL_ENTRY, MAX_JOURNAL_RUNS, UNIT_BYTES, Source

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]  # indices of rows
Transfer = tuple[int, int, int]  # of layers: arguments of `part`
# Which rows of the first array have the bytes of those of the second, of the same length; or are all zeros, if None.
Comparison = Callable[[Rows, Rows | None], Mask]
RUN_BYTES: Final = 8 << 20  # well within the codec's window


@dataclass(frozen=True, slots=True)
class Columns:
    """Rows of an interval, one for each block of each write, ascending by seq. All arrays have length n.

    Attributes:
        volume: uint16; block, seq: int64; checksum: uint64, xxh3_64 of the block.
    """

    volume: npt.NDArray[np.uint16]
    block: Int64s
    seq: Int64s
    checksum: UInt64s

    def picked(self, rows: Rows) -> Columns:
        """These rows, in this order."""
        return Columns(self.volume[rows], self.block[rows], self.seq[rows], self.checksum[rows])


@dataclass(frozen=True, slots=True)
class SnapshotDiff:
    """Last content of each block written.

    Attributes:
        entries: DIFF_ENTRY[k], ascending by (volume, block).
        rows: the row behind each entry, int64[k]; units: uint64[k], where its content is, 0 for zeros.
        data_rows: rows whose contents DIFF_BLOCKS holds, in its order; shared_rows: those that share one of them.
        size_bytes: of DIFF_BLOCKS.
    """

    entries: npt.NDArray[np.void]
    rows: Rows
    units: UInt64s
    data_rows: Rows
    shared_rows: Rows
    size_bytes: int


@dataclass(frozen=True, slots=True)
class JournalPart:
    """What of a difference journal goes in one transfer.

    Attributes:
        entries: JOURNAL_ENTRY[n], in at most MAX_JOURNAL_RUNS runs that ascend by (volume, block, seq).
        data_rows: rows whose contents JOURNAL_BLOCKS holds, in its order; data_sizes: int64, bytes of each.
        shared_rows: those that share a content, in the order of the entries.
    """

    entries: npt.NDArray[np.void]
    data_rows: Rows
    shared_rows: Rows
    data_sizes: Int64s


@dataclass(frozen=True, slots=True)
class DifferenceJournal:
    """The interval's writes, and where the content of each is. All arrays have length n but those of layers.

    Attributes:
        layer: int64, that each row comes with. sizes: int64, bytes of each row's block.
        source: uint16; JOURNAL where only the journal has its content. unit: uint64, for SHARED_SNAPSHOT.
        content: int64, one row of all that have the same content: the first by layer, then by seq.
        counts, data_bytes: int64[layers], rows up to and with each layer, and what their contents take in one transfer.
    """

    columns: Columns
    layer: Int64s
    sizes: Int64s
    source: npt.NDArray[np.uint16]
    unit: UInt64s
    content: Rows
    counts: Int64s
    data_bytes: Int64s

    def placed(self, earlier: Sequence[Transfer]) -> UInt64s:
        """uint64[n]: by `content`, 1 + the unit of JOURNAL_BLOCKS where earlier transfers put it, 0 where none did."""
        placed = np.zeros(len(self.sizes), dtype=np.uint64)
        for base, layer, base_bytes in earlier:
            part = self.part(base, layer, base_bytes, placed=placed)
            starts = base_bytes + np.cumsum(part.data_sizes) - part.data_sizes
            placed[self.content[part.data_rows]] = starts // UNIT_BYTES + 1
        return placed

    def part(
        self, base: int, layer: int, base_bytes: int = 0, run_bytes: int = RUN_BYTES, placed: UInt64s | None = None
    ) -> JournalPart:
        """What layers after `base` (-1: from the first) up to and with `layer` add.

        The replica wants rows that ascend by (volume, block, seq), and contents in the order of the rows. The link's
        codec wants contents in the order of writing: there it finds versions of a block, and blocks that were written
        together, next to each other (contents sent layer after layer took half as much again, measured on SQLite's
        log). So the order of writing is cut into runs of some MiB, and rows ascend within a run. The last run goes
        first: the diff has just carried what was written after it.

        Args:
            base_bytes: of JOURNAL_BLOCKS that the replica has. run_bytes: contents of a run, if not too many.
            placed: contents in it that are known; without them a content may come once more.
        """
        picked = np.flatnonzero((self.layer > base) & (self.layer <= layer))
        source, sizes, unit = self.source[picked], self.sizes[picked], self.unit[picked]
        if placed is not None:
            there = np.where(source == int(Source.JOURNAL), placed[self.content[picked]], 0)
            source[there > 0] = int(Source.SHARED_JOURNAL)
            unit[there > 0] = there[there > 0] - 1
        # Rows whose content only the journal has: of those with the same content the first one carries it.
        journal = np.flatnonzero(source == int(Source.JOURNAL))
        _, firsts, of = np.unique(self.content[picked[journal]], return_index=True, return_inverse=True)
        carriers = journal[firsts]
        carries = np.zeros(len(picked), dtype=np.bool_)
        carries[carriers] = True
        # A row belongs to the run in which the contents carried up to and with it end; rows are sorted by run, the
        # last run first, then by volume, block and order of writing.
        ends = np.cumsum(np.where(carries, sizes, 0))
        total_bytes = int(ends[-1]) if len(ends) else 0
        step = max(run_bytes, -(-total_bytes // MAX_JOURNAL_RUNS))
        run = np.maximum(ends - 1, 0) // step
        volume, block = self.columns.volume[picked], self.columns.block[picked]
        order = np.lexsort((picked, block, volume, -run))
        # Contents stand in the order of their rows, behind those that the replica has; the others point to them.
        own = order[carries[order]]
        unit[own] = (base_bytes + np.cumsum(sizes[own]) - sizes[own]) // UNIT_BYTES
        unit[journal] = unit[carriers[of]]
        source[journal] = np.where(carries[journal], int(Source.JOURNAL), int(Source.SHARED_JOURNAL))
        shared = source >= int(Source.SHARED_SNAPSHOT)
        entries = np.zeros(len(picked), dtype=JOURNAL_ENTRY)
        entries["volume"], entries["block"], entries["seq"] = volume, block, self.columns.seq[picked]
        entries["source"] = source
        entries["unit"][shared] = unit[shared]
        return JournalPart(entries[order], picked[own], picked[order[shared[order]]], sizes[own])


def by_block(columns: Columns) -> tuple[Rows, Mask]:
    """The rows ascending by (volume, block, seq), and which of these the next one overwrites."""
    order = np.lexsort((columns.seq, columns.block, columns.volume))
    volume, block = columns.volume[order], columns.block[order]
    followed = np.zeros(len(order), dtype=np.bool_)
    followed[:-1] = (volume[1:] == volume[:-1]) & (block[1:] == block[:-1])
    return order, followed


def _zero_rows(columns: Columns, zero_checksums: UInt64s, same: Comparison) -> Mask:
    """Which rows are all zeros: the checksum proposes, the bytes decide."""
    mask: Mask = columns.checksum == zero_checksums[columns.volume]
    rows = np.flatnonzero(mask)
    if len(rows):
        mask[rows] = same(rows, None)
    return mask


def snapshot_diff(
    columns: Columns, block_sizes: Int64s, zero_checksums: UInt64s, same: Comparison
) -> SnapshotDiff:
    """The last content of each block that the interval's writes touched.

    Args:
        block_sizes: int64[volumes], bytes. zero_checksums: uint64[volumes], of a zero block of each.
    """
    order, followed = by_block(columns)
    rows = order[~followed]
    picked = columns.picked(rows)

    def same_picked(a: Rows, b: Rows | None) -> Mask:
        return same(rows[a], None if b is None else rows[b])

    zero = _zero_rows(picked, zero_checksums, same_picked)
    everything = np.arange(len(rows))
    carrier = _carriers(picked, zero, np.zeros(len(rows), dtype=np.bool_), everything, block_sizes, same_picked)
    shared = carrier != everything
    own = np.flatnonzero(~shared & ~zero)
    units = np.zeros(len(rows), dtype=np.uint64)
    sizes = block_sizes[picked.volume[own]]
    units[own] = (np.cumsum(sizes) - sizes) // UNIT_BYTES
    units[shared] = units[carrier[shared]]
    entries = np.zeros(len(rows), dtype=DIFF_ENTRY)
    entries["volume"], entries["block"] = picked.volume, picked.block
    entries["source"] = int(Source.SNAPSHOT)
    entries["source"][zero], entries["source"][shared] = int(Source.ZERO), int(Source.SHARED_SNAPSHOT)
    entries["unit"][shared] = units[shared]
    return SnapshotDiff(entries, rows, units, rows[own], rows[shared], int(sizes.sum()))


def difference_journal(
    columns: Columns,
    times_ns: Int64s,
    to_time_ns: int,
    diff: SnapshotDiff,
    block_sizes: Int64s,
    zero_checksums: UInt64s,
    same: Comparison,
) -> DifferenceJournal:
    """Figure 9: metadata for every write, data only for contents that are nowhere else; in layers.

    Args:
        times_ns: int64[n], of each row. to_time_ns: of the interval's end.
        diff: the snapshot diff of the same columns.
    """
    count = len(columns.seq)
    order, followed = by_block(columns)
    layer = np.empty(count, dtype=np.int64)
    layer[order] = layers_of(times_ns[order], followed, to_time_ns)
    place = np.empty(count, dtype=np.int64)  # of each row by layer, then by seq
    place[np.argsort(layer, kind="stable")] = np.arange(count)
    zero = _zero_rows(columns, zero_checksums, same)
    in_diff = np.zeros(count, dtype=np.bool_)
    in_diff[diff.rows[diff.entries["source"] != int(Source.ZERO)]] = True
    content = _carriers(columns, zero, in_diff, place, block_sizes, same)
    unit = np.zeros(count, dtype=np.uint64)
    unit[diff.rows] = diff.units
    source = np.where(in_diff[content], int(Source.SHARED_SNAPSHOT), int(Source.JOURNAL)).astype(np.uint16)
    source[in_diff], source[zero] = int(Source.SNAPSHOT), int(Source.ZERO)
    sizes = block_sizes[columns.volume]
    first = (source == int(Source.JOURNAL)) & (content == np.arange(count))
    return DifferenceJournal(
        columns, layer, sizes, source, unit[content], content,
        np.cumsum(np.bincount(layer, minlength=len(RUNGS_NS))),
        np.cumsum(np.bincount(layer[first], sizes[first], minlength=len(RUNGS_NS)).astype(np.int64)),
    )  # fmt: skip


def _carriers(
    columns: Columns, zero: Mask, in_diff: Mask, place: Int64s, block_sizes: Int64s, same: Comparison
) -> Rows:
    """For each row the one that carries its content: of the diff, else the first by `place`; or itself.

    Rows are sorted by checksum and size, the best carrier first; it is proposed to the others of its group, and the
    bytes decide. Rows of zeros and rows of the diff need no carrier.
    """
    count = len(columns.seq)
    carrier = np.arange(count)
    size = block_sizes[columns.volume]
    order = np.lexsort((place, ~in_diff, size, columns.checksum))
    first = np.ones(count, dtype=np.bool_)
    checksum, sizes = columns.checksum[order], size[order]
    first[1:] = (checksum[1:] != checksum[:-1]) | (sizes[1:] != sizes[:-1])
    leader = order[np.maximum.accumulate(np.where(first, np.arange(count), 0))]
    proposed = np.empty(count, dtype=np.int64)
    proposed[order] = leader
    rows = np.flatnonzero((proposed != carrier) & ~zero & ~in_diff & ~zero[proposed])
    if len(rows):
        equal = same(rows, proposed[rows])
        carrier[rows[equal]] = proposed[rows[equal]]
    return carrier
