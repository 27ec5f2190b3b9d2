"""An interval as a transfer: the difference, the decision, the frames (figures 7 and 9)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest, xxh3_128

from pitfs.errors import CorruptionError
from pitfs.model.difference import (
    Contents,
    DifferenceJournal,
    Mask,
    Rows,
    SnapshotDiff,
    difference_journal,
    snapshot_diff,
)
from pitfs.model.granularity import EVERY_WRITE, Decision
from pitfs.model.ladder import RUNGS_NS, Layers, layers_of_positions
from pitfs.model.record import block_checksums
from pitfs.model.transfer import (
    DIFF_ENTRY,
    JOURNAL_ENTRY,
    MAX_CHECKPOINT_BYTES,
    MAX_PAYLOAD_BYTES,
    POSITION,
    Bookmark,
    Checkpoint,
    Data,
    End,
    Gap,
    Kind,
    Manifest,
    ResumePoint,
    Section,
    TransferFrame,
    VolumeInfo,
    Welcome,
)
from pitfs.production.reader import BlockSource, Copy, Interval

COMPARE_BYTES: Final = 4 << 20  # blocks compared at once: bounds what is held
FORMAT: Final = 1  # of the sections' order; part of the identity
MAX_CAUSE_LENGTH: Final = 1000  # characters: what the link's manifest takes; errors with long paths have more


def zero_checksums(volumes: tuple[VolumeInfo, ...]) -> npt.NDArray[np.uint64]:
    """xxh3_64 of a block of zeros of each volume, uint64[volumes]."""
    return np.array([xxh3_64_intdigest(bytes(volume.block_size)) for volume in volumes], dtype=np.uint64)


@dataclass(frozen=True, slots=True)
class Shipment:
    """An interval ready to go. `journal` is what the decision leaves of it, None if that is nothing.

    positions: POSITION[n], the states inside the interval that can be given.
    """

    manifest: Manifest
    interval: Interval
    diff: SnapshotDiff
    journal: DifferenceJournal | None
    positions: npt.NDArray[np.void]
    decision: Decision


def prepare(
    interval: Interval,
    volumes: tuple[VolumeInfo, ...],
    source: BlockSource,
    decide: Callable[[int, Sequence[int | None]], Decision],
    wants_journal: bool,
) -> Shipment:
    """Builds the difference of an interval and decides what of it goes.

    Args:
        decide: (bytes of the diff, of the difference journal on each rung) → decision, figure 7.
        wants_journal: False where the mode never sends one: then none is built.

    Raises:
        CorruptionError: the local journal is damaged.
    """
    block_sizes = np.array([volume.block_size for volume in volumes], dtype=np.int64)
    zeros = zero_checksums(volumes)
    contents = _contents(source, block_sizes, interval)
    diff = snapshot_diff(interval.columns, block_sizes, zeros, contents)
    journal, positions = None, np.zeros(0, dtype=POSITION)
    rung_bytes: list[int | None] = [0] * len(RUNGS_NS)
    if wants_journal and len(interval.times):
        times_ns = interval.times[interval.columns.seq - interval.from_seq - 1]
        journal = difference_journal(
            interval.columns, times_ns, interval.to_time_ns, diff, block_sizes, zeros, contents
        )
        positions, position_layers = _positions(interval)
        rung_bytes = _bytes_of_rungs(journal, position_layers)
    decision = decide(diff.size_bytes + diff.entries.nbytes, rung_bytes)
    if decision.granularity_ns is None:
        journal, positions = None, positions[:0]
    elif journal is not None and decision.granularity_ns > 0:
        layer = RUNGS_NS.index(decision.granularity_ns)
        journal, positions = journal.up_to(layer), positions[position_layers <= layer]
    manifest = _manifest(interval, diff, journal, positions, decision)
    return Shipment(manifest, interval, diff, journal, positions, decision)


def _positions(interval: Interval) -> tuple[npt.NDArray[np.void], Layers]:
    """The state after each write, and the layer that each comes with."""
    positions = np.empty(len(interval.times), dtype=POSITION)
    positions["seq"] = np.arange(interval.from_seq + 1, interval.to_seq + 1)
    positions["time_ns"] = interval.times
    return positions, layers_of_positions(interval.times, interval.to_time_ns)


def _bytes_of_rungs(journal: DifferenceJournal, position_layers: Layers) -> list[int | None]:
    """What the difference journal takes on each rung; None where there is no position on it."""
    count = len(RUNGS_NS)
    positions = np.bincount(position_layers, minlength=count)
    rows = np.bincount(journal.layers, minlength=count)
    data = np.bincount(journal.data_layers, weights=journal.data_sizes, minlength=count)
    sizes = np.cumsum(positions * POSITION.itemsize + rows * JOURNAL_ENTRY.itemsize + data)
    return [
        int(size) if reached else None
        for size, reached in zip(sizes.tolist(), np.cumsum(positions).tolist(), strict=True)
    ]


def _contents(source: BlockSource, block_sizes: npt.NDArray[np.int64], interval: Interval) -> Contents:
    volume = interval.columns.volume

    def pieces(rows: Rows) -> Iterator[tuple[slice, int]]:
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

    def same(a: Rows, b: Rows) -> Mask:
        mask = np.zeros(len(a), dtype=np.bool_)
        for piece, size in pieces(a):
            mask[piece] = (blocks(a[piece], size) == blocks(b[piece], size)).all(axis=1)
        return mask

    def zero(rows: Rows) -> Mask:
        mask = np.zeros(len(rows), dtype=np.bool_)
        for piece, size in pieces(rows):
            mask[piece] = ~blocks(rows[piece], size).any(axis=1)
        return mask

    return Contents(same, zero)


def _manifest(
    interval: Interval,
    diff: SnapshotDiff,
    journal: DifferenceJournal | None,
    positions: npt.NDArray[np.void],
    decision: Decision,
) -> Manifest:
    identity = xxh3_128(f"{FORMAT} {interval.mark} {interval.from_seq} {decision.granularity_ns}".encode())
    identity.update(diff.entries.tobytes())
    if journal is not None:
        identity.update(journal.entries.tobytes())
        identity.update(positions.tobytes())
    bookmarks: tuple[Bookmark, ...] = ()
    if interval.bookmark is not None:
        bookmarks = (Bookmark(interval.bookmark, interval.to_seq, interval.to_time_ns),)
    return Manifest(
        mark=interval.mark,
        kind=Kind.INTERVAL,
        from_seq=interval.from_seq,
        from_time_ns=interval.from_time_ns,
        to_seq=interval.to_seq,
        to_time_ns=interval.to_time_ns,
        first_time_ns=int(interval.times[0]) if len(interval.times) else None,
        protected_through_ns=interval.mark_time_ns,
        granularity_ns=decision.granularity_ns,
        cause=decision.reason if decision.granularity_ns != EVERY_WRITE else "",
        diff_count=len(diff.entries),
        journal_count=len(journal.entries) if journal else 0,
        position_count=len(positions),
        identity=identity.hexdigest(),
        bookmarks=bookmarks,
    )


def copy_manifest(copy: Copy, history: str, welcome: Welcome) -> Manifest:
    """The manifest of a complete copy.

    Args:
        welcome: where the replica stands: what lies between that and the copy is a gap.
    """
    start = copy.start
    cause = start.cause
    if len(cause) > MAX_CAUSE_LENGTH:
        cause = cause[: MAX_CAUSE_LENGTH - 1] + "…"
    before = (welcome.seq, welcome.time_ns) if welcome.mark else (copy.seq, copy.time_ns)
    gaps: tuple[Gap, ...] = ()
    if welcome.mark:
        gaps = (Gap(*before, copy.seq, copy.time_ns, cause),)
    return Manifest(
        mark=start.mark,
        kind=Kind.FULL,
        from_seq=before[0],
        from_time_ns=before[1],
        to_seq=copy.seq,
        to_time_ns=copy.time_ns,
        first_time_ns=None,
        protected_through_ns=copy.time_ns,
        granularity_ns=None,
        cause=cause or "the first full copy",
        diff_count=None,
        journal_count=0,
        position_count=0,
        identity=f"{FORMAT} {history} full {start.mark}",
        gaps=gaps,
    )


def frames(
    shipment: Shipment, source: BlockSource, volumes: tuple[VolumeInfo, ...], resume: ResumePoint
) -> Iterator[TransferFrame]:
    """The frames of an interval's transfer behind what the replica durably has.

    Raises:
        CorruptionError: the local journal is damaged; what was sent so far was right.
    """
    diff, journal = shipment.diff, shipment.journal
    lengths = [diff.entries.nbytes, diff.size_bytes, 0, 0, 0]
    parts = [
        _plain(Section.DIFF, diff.entries.tobytes(), DIFF_ENTRY.itemsize, resume),
        _blocks(Section.DIFF_BLOCKS, diff.data_rows, shipment.interval, source, volumes, resume),
    ]
    if journal is not None:
        lengths[2:] = shipment.positions.nbytes, journal.entries.nbytes, journal.size_bytes
        parts += [
            _plain(Section.POSITIONS, shipment.positions.tobytes(), POSITION.itemsize, resume),
            _plain(Section.JOURNAL, journal.entries.tobytes(), JOURNAL_ENTRY.itemsize, resume),
            _blocks(Section.JOURNAL_BLOCKS, journal.data_rows, shipment.interval, source, volumes, resume),
        ]
    unacknowledged = 0
    for part in parts:
        for data in part:
            unacknowledged += len(data.payload)
            yield data
            if unacknowledged >= MAX_CHECKPOINT_BYTES:
                unacknowledged = 0
                yield Checkpoint(())
    yield End((lengths[0], lengths[1], lengths[2], lengths[3], lengths[4]))


def _plain(section: Section, content: bytes, row_bytes: int, resume: ResumePoint) -> Iterator[Data]:
    """Rows, in frames of whole ones."""
    step = MAX_PAYLOAD_BYTES // row_bytes * row_bytes
    view = memoryview(content)
    for start in range(resume.lengths[section - 1], len(content), step):
        yield Data(section, start, view[start : start + step])


def _blocks(
    section: Section,
    rows: Rows,
    interval: Interval,
    source: BlockSource,
    volumes: tuple[VolumeInfo, ...],
    resume: ResumePoint,
) -> Iterator[Data]:
    """The rows' blocks, verified, in frames of whole blocks."""
    sizes = np.array([volume.block_size for volume in volumes], dtype=np.int64)[interval.columns.volume[rows]]
    ends = np.cumsum(sizes)
    start = int(np.searchsorted(ends, resume.lengths[section - 1], side="right"))
    while start < len(rows):
        offset = int(ends[start] - sizes[start])
        stop = max(start + 1, int(np.searchsorted(ends, offset + MAX_PAYLOAD_BYTES, side="right")))
        payload = source.read(rows[start:stop])
        _verify(payload, sizes[start:stop], interval.columns.checksum[rows[start:stop]])
        yield Data(section, offset, payload)
        start = stop


def _verify(payload: bytearray, sizes: npt.NDArray[np.int64], checksums: npt.NDArray[np.uint64]) -> None:
    """Every block is compared with the checksum taken at the splitter before it goes out."""
    if int(sizes[0]) * len(sizes) == len(payload) and (sizes == sizes[0]).all():
        found = block_checksums(payload, int(sizes[0]))
    else:
        view, at, found = memoryview(payload), 0, []
        for size in sizes.tolist():
            found.append(xxh3_64_intdigest(view[at : at + size]))
            at += size
    if found != checksums.tolist():
        raise CorruptionError(
            "local journal", 0, "a block doesn't match the checksum taken when it was written"
        )
