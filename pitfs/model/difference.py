"""An interval's writes → snapshot diff and difference journal (figures 6B and 9). Pure.

The journal's records come as columns with a row for each block of each write, in the order of writing. The
snapshot diff is the last row of each block; a content that several blocks end with is in it once. The difference
journal is all rows, layer by layer, and carries data only where neither the diff, nor zeros, nor an earlier row of
the interval has the same content.
Equal checksums make rows candidates for that; the bytes decide (invariant 6).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pitfs.model.ladder import RUNGS_NS, layers_of
from pitfs.model.transfer import DIFF_ENTRY, JOURNAL_ENTRY, UNIT_BYTES, Source

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]  # indices of rows


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


@dataclass(frozen=True, slots=True)
class SnapshotDiff:
    """Last content of each block written.

    Attributes:
        entries: DIFF_ENTRY[k], ascending by (volume, block).
        rows: the row behind each entry, int64[k]; units: uint64[k], where its content stands, 0 for zeros.
        data_rows: rows whose contents DIFF_BLOCKS holds, in its order.
        size_bytes: of DIFF_BLOCKS.
    """

    entries: npt.NDArray[np.void]
    rows: Rows
    units: UInt64s
    data_rows: Rows
    size_bytes: int


@dataclass(frozen=True, slots=True)
class DifferenceJournal:
    """The interval's writes, with data only where the fourth snapshot doesn't have them; layer after layer.

    Attributes:
        entries: JOURNAL_ENTRY[n], ascending by (layer, volume, block, seq).
        ends: int64[layers], where each layer ends in entries.
        data_rows: rows whose contents JOURNAL_BLOCKS holds, in its order; data_sizes: int64, bytes of each.
        data_ends: int64[layers], where each layer ends in these two.
    """

    entries: npt.NDArray[np.void]
    ends: Int64s
    data_rows: Rows
    data_sizes: Int64s
    data_ends: Int64s

    def bytes_up_to(self, layer: int) -> int:
        """Of JOURNAL_BLOCKS, up to and with that layer; -1: none."""
        return int(self.data_sizes[: self.data_ends[layer]].sum()) if layer >= 0 else 0

    def layers(self, base: int, layer: int) -> DifferenceJournal:
        """What layers after `base` (-1: from the first) up to and with `layer` add."""
        start, data_start = (int(ends[base]) if base >= 0 else 0 for ends in (self.ends, self.data_ends))
        end, data_end = int(self.ends[layer]), int(self.data_ends[layer])
        return DifferenceJournal(
            self.entries[start:end], self.ends[: layer + 1].clip(start) - start,
            self.data_rows[data_start:data_end], self.data_sizes[data_start:data_end],
            self.data_ends[: layer + 1].clip(data_start) - data_start,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Contents:
    """How to look at the rows' bytes; each takes equal-length arrays of rows and gives a mask.

    Attributes:
        same: whether the rows of the first array have the bytes of those of the second.
        zero: whether the rows are all zeros.
    """

    same: Callable[[Rows, Rows], Mask]
    zero: Callable[[Rows], Mask]


def _zero_rows(columns: Columns, zero_checksums: UInt64s, contents: Contents) -> Mask:
    """Which rows are all zeros: the checksum proposes, the bytes decide."""
    mask: Mask = columns.checksum == zero_checksums[columns.volume]
    rows = np.flatnonzero(mask)
    if len(rows):
        mask[rows] = contents.zero(rows)
    return mask


def _units(columns: Columns, rows: Rows, block_sizes: Int64s) -> tuple[UInt64s, int]:
    """Where each of `rows` begins when their blocks stand one behind the other, in units; and the end, in bytes."""
    sizes = block_sizes[columns.volume[rows]] // UNIT_BYTES
    ends = np.cumsum(sizes, dtype=np.int64)
    return (ends - sizes).astype(np.uint64), int(ends[-1]) * UNIT_BYTES if len(ends) else 0


def snapshot_diff(
    columns: Columns, block_sizes: Int64s, zero_checksums: UInt64s, contents: Contents
) -> SnapshotDiff:
    """The last content of each block that the interval's writes touched.

    Args:
        block_sizes: int64[volumes], bytes. zero_checksums: uint64[volumes], of a zero block of each.
    """
    order = np.lexsort((columns.seq, columns.block, columns.volume))
    volume, block = columns.volume[order], columns.block[order]
    last = np.ones(len(order), dtype=np.bool_)
    last[:-1] = (volume[1:] != volume[:-1]) | (block[1:] != block[:-1])
    rows = order[last]
    picked = Columns(columns.volume[rows], columns.block[rows], columns.seq[rows], columns.checksum[rows])
    looks = Contents(lambda a, b: contents.same(rows[a], rows[b]), lambda a: contents.zero(rows[a]))
    zero = _zero_rows(picked, zero_checksums, looks)
    everything = np.arange(len(rows))
    carrier = _carriers(picked, zero, np.zeros(len(rows), dtype=np.bool_), everything, block_sizes, looks)
    shared = carrier != everything
    own = np.flatnonzero(~shared & ~zero)
    units = np.zeros(len(rows), dtype=np.uint64)
    units[own], size_bytes = _units(picked, own, block_sizes)
    units[shared] = units[carrier[shared]]
    entries = np.zeros(len(rows), dtype=DIFF_ENTRY)
    entries["volume"], entries["block"] = picked.volume, picked.block
    entries["source"] = int(Source.FOURTH)
    entries["source"][zero], entries["source"][shared] = int(Source.ZERO), int(Source.SHARED_FOURTH)
    entries["unit"][shared], entries["checksum"][shared] = units[shared], picked.checksum[shared]
    return SnapshotDiff(entries, rows, units, rows[own], size_bytes)


def difference_journal(
    columns: Columns,
    times_ns: Int64s,
    to_time_ns: int,
    diff: SnapshotDiff,
    block_sizes: Int64s,
    zero_checksums: UInt64s,
    contents: Contents,
) -> DifferenceJournal:
    """Figure 9: metadata for every write, data only for contents that are nowhere else; in layers.

    Args:
        times_ns: int64[n], of each row. to_time_ns: of the interval's end.
        diff: the snapshot diff of the same columns.
    """
    count = len(columns.seq)
    order = np.lexsort((columns.seq, columns.block, columns.volume))
    volume, block = columns.volume[order], columns.block[order]
    followed = np.zeros(count, dtype=np.bool_)
    followed[:-1] = (volume[1:] == volume[:-1]) & (block[1:] == block[:-1])
    layers = np.empty(count, dtype=np.uint8)
    layers[order] = layers_of(times_ns[order], followed, to_time_ns)
    order = order[np.argsort(layers[order], kind="stable")]
    place = np.empty(count, dtype=np.int64)  # of each row in that order
    place[order] = np.arange(count)
    zero = _zero_rows(columns, zero_checksums, contents)
    in_diff = np.zeros(count, dtype=np.bool_)
    in_diff[diff.rows[diff.entries["source"] != int(Source.ZERO)]] = True
    carrier = _carriers(columns, zero, in_diff, place, block_sizes, contents)
    carries = carrier == np.arange(count)
    own = order[(carries & ~in_diff & ~zero)[order]]
    unit = np.zeros(count, dtype=np.uint64)
    unit[diff.rows], unit[own] = diff.units, _units(columns, own, block_sizes)[0]
    source = np.where(in_diff[carrier], int(Source.SHARED_FOURTH), int(Source.SHARED_JOURNAL))
    source[in_diff], source[own], source[zero] = int(Source.FOURTH), int(Source.JOURNAL), int(Source.ZERO)
    shared = ~carries
    entries = np.zeros(count, dtype=JOURNAL_ENTRY)
    entries["volume"], entries["block"], entries["seq"] = columns.volume, columns.block, columns.seq
    entries["source"] = source
    entries["unit"][shared], entries["checksum"][shared] = unit[carrier[shared]], columns.checksum[shared]
    everything = np.arange(len(RUNGS_NS))
    return DifferenceJournal(
        entries[order], np.searchsorted(layers[order], everything, side="right"),
        own, block_sizes[columns.volume[own]], np.searchsorted(layers[own], everything, side="right"),
    )  # fmt: skip


def _carriers(
    columns: Columns, zero: Mask, in_diff: Mask, place: Int64s, block_sizes: Int64s, contents: Contents
) -> Rows:
    """For each row the one that carries its content: of the diff, else the first by `place`; or itself."""
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
        equal = contents.same(rows, proposed[rows])
        carrier[rows[equal]] = proposed[rows[equal]]
    return carrier
