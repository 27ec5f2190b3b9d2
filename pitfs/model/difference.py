"""An interval's writes → snapshot diff and difference journal (figures 6B and 9), and back (figure 8). Pure.

The journal's records come as columns with a row for each block of each write, in the order of writing. The
snapshot diff is the last row of each block. The difference journal is all rows, sorted for looking up, and
carries data only where neither the diff, nor zeros, nor an earlier row of the interval has the same content.
Equal checksums make rows candidates for that; the bytes decide (invariant 6).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pitfs.model.ladder import Layers, layers_of
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
        rows: the row behind each entry, int64[k].
        data_rows: rows whose contents DIFF_BLOCKS holds, in its order.
        size_bytes: of DIFF_BLOCKS.
    """

    entries: npt.NDArray[np.void]
    rows: Rows
    data_rows: Rows
    size_bytes: int


@dataclass(frozen=True, slots=True)
class DifferenceJournal:
    """The interval's writes in order, with data only where the fourth snapshot doesn't have them.

    Attributes:
        entries: JOURNAL_ENTRY[n], ascending by (volume, block, seq).
        layers: the layer of the ladder that each entry comes with.
        data_rows: rows whose contents JOURNAL_BLOCKS holds, in its order: by layer, then in that of writing.
        data_sizes: int64, bytes of each; data_layers: its layer.
    """

    entries: npt.NDArray[np.void]
    layers: Layers
    data_rows: Rows
    data_sizes: Int64s
    data_layers: Layers

    @property
    def size_bytes(self) -> int:
        """Of JOURNAL_BLOCKS."""
        return int(self.data_sizes.sum())

    def up_to(self, layer: int) -> DifferenceJournal:
        """What layers up to and with that one hold: its JOURNAL_BLOCKS is the beginning of this one's."""
        entries, data = self.layers <= layer, self.data_layers <= layer
        return DifferenceJournal(
            self.entries[entries], self.layers[entries],
            self.data_rows[data], self.data_sizes[data], self.data_layers[data],
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
    zero = _zero_rows(
        picked,
        zero_checksums,
        Contents(lambda a, b: contents.same(rows[a], rows[b]), lambda a: contents.zero(rows[a])),
    )
    data_rows = rows[~zero]
    units, size_bytes = _units(columns, data_rows, block_sizes)
    entries = np.zeros(len(rows), dtype=DIFF_ENTRY)
    entries["volume"], entries["block"], entries["checksum"] = picked.volume, picked.block, picked.checksum
    entries["source"] = np.where(zero, int(Source.ZERO), int(Source.FOURTH))
    entries["unit"][~zero] = units
    return SnapshotDiff(entries, rows, data_rows, size_bytes)


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
    zero = _zero_rows(columns, zero_checksums, contents)
    in_diff = np.zeros(count, dtype=np.bool_)
    in_diff[diff.data_rows] = True
    carrier = _carriers(columns, zero, in_diff, layers, block_sizes, contents)
    own = np.flatnonzero((carrier == np.arange(count)) & ~in_diff & ~zero)
    own = own[np.argsort(layers[own], kind="stable")]
    units, _ = _units(columns, own, block_sizes)
    unit = np.zeros(count, dtype=np.uint64)
    unit[diff.data_rows] = diff.entries["unit"][diff.entries["source"] == int(Source.FOURTH)]
    unit[own] = units
    source = np.where(in_diff[carrier], int(Source.FOURTH), int(Source.JOURNAL))
    entries = np.zeros(count, dtype=JOURNAL_ENTRY)
    entries["volume"], entries["block"] = volume, block
    entries["seq"], entries["checksum"] = columns.seq[order], columns.checksum[order]
    entries["source"] = np.where(zero, int(Source.ZERO), source)[order]
    entries["unit"] = np.where(zero, np.uint64(0), unit[carrier])[order]
    return DifferenceJournal(entries, layers[order], own, block_sizes[columns.volume[own]], layers[own])


def _carriers(
    columns: Columns, zero: Mask, in_diff: Mask, layers: Layers, block_sizes: Int64s, contents: Contents
) -> Rows:
    """For each row the one that carries its content: of the diff, else the first in the coarsest layer; or itself."""
    count = len(columns.seq)
    carrier = np.arange(count)
    size = block_sizes[columns.volume]
    order = np.lexsort((columns.seq, layers, ~in_diff, size, columns.checksum))
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


def entries_at(entries: npt.NDArray[np.void], seq: int) -> npt.NDArray[np.void]:
    """Figure 8: of each block the last entry of a difference journal not after `seq`.

    Args:
        entries: JOURNAL_ENTRY[n], ascending by (volume, block, seq).

    Returns:
        JOURNAL_ENTRY[m], ascending by (volume, block); blocks that aren't in it stand in the third snapshot.
    """
    until = entries[entries["seq"] <= np.uint64(seq)]
    last = np.ones(len(until), dtype=np.bool_)
    last[:-1] = (until["volume"][1:] != until["volume"][:-1]) | (until["block"][1:] != until["block"][:-1])
    return until[last]
