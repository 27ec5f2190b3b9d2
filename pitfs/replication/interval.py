"""An interval as transfers: its snapshot diff, then the layers of its difference journal (figures 7 and 9).

    Interval --prepare--> PreparedInterval --diff_frames--------------------> the frames of the diff
                                           --pick_layers--> layers_frames --> those of some layers, as often as wanted
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from pitfs.errors import CorruptionError
from pitfs.journal.reader import Interval
from pitfs.model import difference, transfer
from pitfs.model.difference import Rows
from pitfs.model.ladder import RUNGS_NS, Layers, layers_of_positions
from pitfs.model.transfer import Data, ResumePoint, Section, VolumeInfo

COMPARE_BYTES: Final = 4 << 20  # blocks compared at once: bounds what is held


class RowContents(Protocol):
    """What has the contents of an interval's rows: see `journal.reader.BlockSource`."""

    def read(self, rows: Rows) -> bytearray: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class PreparedInterval:
    """An interval ready to be sent.

    Attributes:
        source: of its contents. block_sizes: int64[volumes].
        journal: None where none is wanted, or nothing was written.
        positions: POSITION[n], the states inside the interval; position_layers: the layer of each.
        rung_bytes: of each rung what its layers and those before take, in payload; None where it has no position.
    """

    interval: Interval
    source: RowContents
    block_sizes: npt.NDArray[np.int64]
    diff: difference.SnapshotDiff
    journal: difference.DifferenceJournal | None
    positions: npt.NDArray[np.void]
    position_layers: Layers
    rung_bytes: tuple[int | None, ...]

    @property
    def diff_bytes(self) -> int:
        """What the diff takes, in payload."""
        return self.diff.size_bytes + self.diff.entries.nbytes

    @property
    def journal_bytes(self) -> int:
        """What the whole difference journal takes, in payload."""
        return self.rung_bytes[-1] or 0


def prepare(
    interval: Interval, volumes: tuple[VolumeInfo, ...], source: RowContents, wants_journal: bool
) -> PreparedInterval:
    """Builds the difference of an interval. Raises CorruptionError where the local journal is damaged.

    Args:
        wants_journal: False where the mode never sends one: then none is built.
    """
    block_sizes = np.array([volume.block_size for volume in volumes], dtype=np.int64)
    zeros = np.array([xxh3_64_intdigest(bytes(volume.block_size)) for volume in volumes], dtype=np.uint64)
    same = _comparison(source, interval.columns.volume, block_sizes)
    diff = difference.snapshot_diff(interval.columns, block_sizes, zeros, same)
    if not wants_journal or not len(interval.times):
        nothing = np.zeros(0, dtype=transfer.POSITION), np.zeros(0, dtype=np.uint8)
        return PreparedInterval(interval, source, block_sizes, diff, None, *nothing, (None,) * len(RUNGS_NS))
    times_ns = interval.times[interval.columns.seq - interval.from_seq - 1]
    journal = difference.difference_journal(
        interval.columns, times_ns, interval.to_time_ns, diff, block_sizes, zeros, same
    )
    positions = np.empty(len(interval.times), dtype=transfer.POSITION)
    positions["seq"] = np.arange(interval.from_seq + 1, interval.to_seq + 1)
    positions["time_ns"] = interval.times
    position_layers = layers_of_positions(interval.times, interval.to_time_ns)
    counts = np.cumsum(np.bincount(position_layers, minlength=len(RUNGS_NS)))
    sizes = counts * positions.itemsize + journal.counts * transfer.JOURNAL_ENTRY.itemsize + journal.data_bytes
    by_rung = zip(counts.tolist(), sizes.tolist(), strict=True)
    rung_bytes = tuple(size if count else None for count, size in by_rung)
    return PreparedInterval(interval, source, block_sizes, diff, journal, positions, position_layers, rung_bytes)


def _comparison(
    source: RowContents, volume: npt.NDArray[np.uint16], block_sizes: npt.NDArray[np.int64]
) -> difference.Comparison:
    """Compares rows of `source`, no more than COMPARE_BYTES at once."""

    def stretches(rows: Rows) -> Iterator[tuple[slice, int]]:
        """Stretches of rows of one block size, within the limit of what is held."""
        sizes = block_sizes[volume[rows]]
        start = 0
        while start < len(rows):
            size = int(sizes[start])
            other = np.flatnonzero(sizes[start : start + COMPARE_BYTES // size] != size)
            stop = start + (int(other[0]) if len(other) else min(len(rows) - start, COMPARE_BYTES // size))
            yield slice(start, stop), size
            start = stop

    def blocks(rows: Rows, size: int) -> npt.NDArray[np.uint64]:
        return np.frombuffer(source.read(rows), dtype=np.uint64).reshape(len(rows), size // 8)

    def same(a: Rows, b: Rows | None) -> difference.Mask:
        mask = np.zeros(len(a), dtype=np.bool_)
        for stretch, size in stretches(a):
            expected = 0 if b is None else blocks(b[stretch], size)
            mask[stretch] = (blocks(a[stretch], size) == expected).all(axis=1)
        return mask

    return same


@dataclass(frozen=True, slots=True)
class PickedLayers:
    """Layers after `base` up to and with `layer`, to go in one transfer.

    Attributes:
        base_bytes: of JOURNAL_BLOCKS that the replica has.
        part: their rows and contents. positions: POSITION[n], those that they add.
    """

    prepared: PreparedInterval
    base: int
    layer: int
    base_bytes: int
    part: difference.JournalPart
    positions: npt.NDArray[np.void]

    @property
    def end_bytes(self) -> int:
        """Of JOURNAL_BLOCKS that the replica has with these."""
        return self.base_bytes + int(self.part.data_sizes.sum())


def pick_layers(
    prepared: PreparedInterval, base: int, layer: int, base_bytes: int, earlier: Sequence[difference.Transfer] = ()
) -> PickedLayers:
    """What goes next of an interval that has a journal.

    Args:
        earlier: transfers of it that the replica has, as far as they are known: (base, layer, base_bytes) of each.
    """
    assert prepared.journal is not None
    layers = prepared.position_layers.astype(np.int64)
    positions = prepared.positions[(layers > base) & (layers <= layer)]
    part = prepared.journal.part(base, layer, base_bytes, placed=prepared.journal.placed(earlier))
    return PickedLayers(prepared, base, layer, base_bytes, part, positions)


def diff_frames(
    prepared: PreparedInterval, resume: ResumePoint, payload_bytes: int = transfer.MAX_PAYLOAD_BYTES
) -> Iterator[transfer.TransferFrame]:
    """The frames of a snapshot diff behind what the replica durably has.

    Args:
        payload_bytes: of a frame at most (but a block, or a row).

    Raises:
        CorruptionError: the local journal is damaged; what was sent so far was right.
    """
    diff, interval = prepared.diff, prepared.interval
    yield from _with_checkpoints(
        _rows(Section.DIFF, diff.entries, resume, payload_bytes),
        _blocks(Section.DIFF_BLOCKS, diff.data_rows, prepared, resume, payload_bytes),
    )
    checksums = _checksums(interval, diff.data_rows, diff.shared_rows), _checksums(interval)
    yield transfer.End((diff.entries.nbytes, diff.size_bytes, 0, 0, 0), checksums)


def layers_frames(
    picked: PickedLayers, resume: ResumePoint, payload_bytes: int = transfer.MAX_PAYLOAD_BYTES
) -> Iterator[transfer.TransferFrame]:
    """The frames of layers; as `diff_frames`."""
    interval, part, positions = picked.prepared.interval, picked.part, picked.positions
    yield from _with_checkpoints(
        _rows(Section.POSITIONS, positions, resume, payload_bytes),
        _rows(Section.JOURNAL, part.entries, resume, payload_bytes),
        _blocks(Section.JOURNAL_BLOCKS, part.data_rows, picked.prepared, resume, payload_bytes),
    )
    lengths = 0, 0, positions.nbytes, part.entries.nbytes, int(part.data_sizes.sum())
    yield transfer.End(lengths, (_checksums(interval), _checksums(interval, part.data_rows, part.shared_rows)))


def _checksums(interval: Interval, *rows: Rows) -> int:
    """xxh3_64 of the rows' checksums, first those of the first array."""
    return xxh3_64_intdigest(b"".join(interval.columns.checksum[each].astype("<u8").tobytes() for each in rows))


def _with_checkpoints(*parts: Iterator[Data]) -> Iterator[transfer.TransferFrame]:
    unacknowledged = 0
    for data in itertools.chain(*parts):
        unacknowledged += len(data.payload)
        yield data
        if unacknowledged >= transfer.MAX_CHECKPOINT_BYTES:
            unacknowledged = 0
            yield transfer.Checkpoint(())


def _rows(
    section: Section, rows: npt.NDArray[np.void], resume: ResumePoint, payload_bytes: int
) -> Iterator[Data]:
    """Rows as they are, in frames of whole ones."""
    step = payload_bytes // rows.itemsize * rows.itemsize
    view = rows.view(np.uint8).data
    for start in range(resume.lengths[section - 1], len(view), step):
        yield Data(section, start, view[start : start + step])


def _blocks(
    section: Section, rows: Rows, prepared: PreparedInterval, resume: ResumePoint, payload_bytes: int
) -> Iterator[Data]:
    """The rows' blocks in frames of whole blocks, each compared with the checksum taken at the splitter."""
    columns = prepared.interval.columns
    sizes, checksums = prepared.block_sizes[columns.volume[rows]], columns.checksum[rows]
    ends = np.cumsum(sizes)
    start = int(np.searchsorted(ends, resume.lengths[section - 1], side="right"))
    while start < len(rows):
        offset = int(ends[start] - sizes[start])
        stop = max(start + 1, int(np.searchsorted(ends, offset + payload_bytes, side="right")))
        payload = prepared.source.read(rows[start:stop])
        view = memoryview(payload)
        bounds = itertools.pairwise([0, *(ends[start:stop] - offset).tolist()])
        if [xxh3_64_intdigest(view[at:end]) for at, end in bounds] != checksums[start:stop].tolist():
            problem = "a block doesn't match the checksum taken when it was written"
            raise CorruptionError("local journal", 0, problem)
        yield Data(section, offset, payload)
        start = stop
