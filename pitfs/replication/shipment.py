"""An interval as transfers: its snapshot diff, then the layers of its difference journal (figures 7 and 9)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest, xxh3_128

from pitfs.errors import CorruptionError
from pitfs.journal.block_source import BlockSource
from pitfs.journal.reader import Copy, Interval
from pitfs.model.difference import (
    Contents,
    DifferenceJournal,
    JournalPart,
    Mask,
    Rows,
    SnapshotDiff,
    difference_journal,
    snapshot_diff,
)
from pitfs.model.ladder import NO_LAYER, RUNGS_NS, Layers, layers_of_positions
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
    Manifest,
    ResumePoint,
    Section,
    TransferFrame,
    TransferKind,
    VolumeInfo,
    Welcome,
)

COMPARE_BYTES: Final = 4 << 20  # blocks compared at once: bounds what is held
FORMAT: Final = 4  # of the sections' rows and order; part of the identity
MAX_CAUSE_LENGTH: Final = 1000  # characters: what the link's manifest takes; errors with long paths have more


def zero_checksums(volumes: tuple[VolumeInfo, ...]) -> npt.NDArray[np.uint64]:
    """xxh3_64 of a block of zeros of each volume, uint64[volumes]."""
    return np.array([xxh3_64_intdigest(bytes(volume.block_size)) for volume in volumes], dtype=np.uint64)


@dataclass(frozen=True, slots=True)
class Shipment:
    """An interval ready to go.

    Attributes:
        journal: None where none is wanted, or nothing was written.
        positions: POSITION[n], the states inside the interval; position_layers: the layer of each.
        rung_bytes: of each rung what its layers and those before take, in payload; None where it has no position.
    """

    interval: Interval
    diff: SnapshotDiff
    journal: DifferenceJournal | None
    positions: npt.NDArray[np.void]
    position_layers: Layers
    rung_bytes: tuple[int | None, ...]

    @property
    def diff_bytes(self) -> int:
        """What the diff takes, in payload."""
        return self.diff.size_bytes + self.diff.entries.nbytes


def prepare(
    interval: Interval, volumes: tuple[VolumeInfo, ...], source: BlockSource, wants_journal: bool
) -> Shipment:
    """Builds the difference of an interval.

    Args:
        wants_journal: False where the mode never sends one: then none is built.

    Raises:
        CorruptionError: the local journal is damaged.
    """
    block_sizes = np.array([volume.block_size for volume in volumes], dtype=np.int64)
    zeros = zero_checksums(volumes)
    contents = _contents(source, block_sizes, interval)
    diff = snapshot_diff(interval.columns, block_sizes, zeros, contents)
    nothing = np.zeros(0, dtype=POSITION), np.zeros(0, dtype=np.uint8)
    if not wants_journal or not len(interval.times):
        return Shipment(interval, diff, None, *nothing, (None,) * len(RUNGS_NS))
    times_ns = interval.times[interval.columns.seq - interval.from_seq - 1]
    journal = difference_journal(
        interval.columns, times_ns, interval.to_time_ns, diff, block_sizes, zeros, contents
    )
    positions, position_layers = _positions(interval)
    rung_bytes = _bytes_of_rungs(journal, position_layers)
    return Shipment(interval, diff, journal, positions, position_layers, rung_bytes)


def _positions(interval: Interval) -> tuple[npt.NDArray[np.void], Layers]:
    """The state after each write, and the layer that each comes with."""
    positions = np.empty(len(interval.times), dtype=POSITION)
    positions["seq"] = np.arange(interval.from_seq + 1, interval.to_seq + 1)
    positions["time_ns"] = interval.times
    return positions, layers_of_positions(interval.times, interval.to_time_ns)


def _bytes_of_rungs(journal: DifferenceJournal, position_layers: Layers) -> tuple[int | None, ...]:
    """What the difference journal takes on each rung; None where there is no position on it."""
    count = len(RUNGS_NS)
    positions = np.cumsum(np.bincount(position_layers, minlength=count))
    data = [journal.bytes_up_to(layer) for layer in range(count)]
    sizes = positions * POSITION.itemsize + journal.counts * JOURNAL_ENTRY.itemsize + data
    return tuple(
        int(size) if reached else None
        for size, reached in zip(sizes.tolist(), positions.tolist(), strict=True)
    )


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


def diff_manifest(shipment: Shipment, cause: str) -> Manifest:
    """The manifest of an interval's snapshot diff; `cause`: why it has no more, as far as that is known."""
    interval, entries = shipment.interval, shipment.diff.entries
    bookmarks: tuple[Bookmark, ...] = ()
    if interval.bookmark is not None:
        bookmarks = (Bookmark(interval.bookmark, interval.to_seq, interval.to_time_ns),)
    return Manifest(
        mark=interval.mark,
        kind=TransferKind.INTERVAL,
        granularity_ns=None,
        diff_count=len(entries),
        journal_count=0,
        position_count=0,
        identity=_identity(f"diff {interval.mark}", entries),
        cause=cause,
        bookmarks=bookmarks,
        **_positions_of(interval),
    )


@dataclass(frozen=True, slots=True)
class PickedLayers:
    """Layers after `base` up to and with `layer`, to go in one transfer.

    Attributes:
        base_bytes: of JOURNAL_BLOCKS that the replica has.
        part: their rows and contents. positions: POSITION[n], those that they add.
    """

    interval: Interval
    base: int
    layer: int
    base_bytes: int
    part: JournalPart
    positions: npt.NDArray[np.void]

    @property
    def end_bytes(self) -> int:
        """Of JOURNAL_BLOCKS that the replica has with these."""
        return self.base_bytes + int(self.part.data_sizes.sum())


def pick_layers(shipment: Shipment, base: int, layer: int, base_bytes: int) -> PickedLayers:
    """What goes next of a shipment that has a journal."""
    assert shipment.journal is not None
    layers = shipment.position_layers.astype(np.int64)
    positions = shipment.positions[(layers > base) & (layers <= layer)]
    part = shipment.journal.part(base, layer, base_bytes)
    return PickedLayers(shipment.interval, base, layer, base_bytes, part, positions)


def layers_manifest(picked: PickedLayers, cause: str) -> Manifest:
    """The manifest of layers; the same for the same ones: only its cause is new.

    Args:
        cause: why no finer ones come with it, empty for the last.
    """
    interval, base, layer = picked.interval, picked.base, picked.layer
    return Manifest(
        mark=interval.mark,
        kind=TransferKind.LAYERS,
        granularity_ns=RUNGS_NS[layer],
        base_granularity_ns=None if base == NO_LAYER else RUNGS_NS[base],
        base_bytes=picked.base_bytes,
        diff_count=0,
        journal_count=len(picked.part.entries),
        position_count=len(picked.positions),
        identity=_identity(f"layers {interval.mark} {base} {layer}", picked.part.entries, picked.positions),
        cause=cause,
        **_positions_of(interval),
    )


def cause_manifest(
    mark: int,
    from_position: tuple[int, int],
    to_position: tuple[int, int],
    granularity_ns: int | None,
    base_bytes: int,
    cause: str,
) -> Manifest:
    """The manifest that says why an interval stays at the granularity that it has; nothing comes with it."""
    return Manifest(
        mark=mark,
        kind=TransferKind.LAYERS,
        from_seq=from_position[0],
        from_time_ns=from_position[1],
        to_seq=to_position[0],
        to_time_ns=to_position[1],
        first_time_ns=None,
        protected_through_ns=to_position[1],
        granularity_ns=granularity_ns,
        base_granularity_ns=granularity_ns,
        base_bytes=base_bytes,
        cause=cause,
        diff_count=0,
        journal_count=0,
        position_count=0,
        identity=_identity(f"cause {mark}"),
    )


def no_frames() -> tuple[TransferFrame, ...]:
    """The frames of a transfer without any content."""
    return (End((0, 0, 0, 0, 0)),)


def _positions_of(interval: Interval) -> dict[str, Any]:
    return {
        "from_seq": interval.from_seq,
        "from_time_ns": interval.from_time_ns,
        "to_seq": interval.to_seq,
        "to_time_ns": interval.to_time_ns,
        "first_time_ns": int(interval.times[0]) if len(interval.times) else None,
        "protected_through_ns": interval.mark_time_ns,
    }


def _identity(what: str, *columns: npt.NDArray[np.void]) -> str:
    identity = xxh3_128(f"{FORMAT} {what}".encode())
    for column in columns:
        identity.update(_bytes(column))
    return identity.hexdigest()


def _bytes(rows: npt.NDArray[np.void]) -> memoryview:
    """Rows as they go over the link, not copied."""
    return rows.view(np.uint8).data if len(rows) else memoryview(b"")


def leads_on(copy: Copy, welcome: Welcome) -> bool:
    """Whether the replica, which stands there, can take the copy: one of changes builds on one state alone."""
    start = copy.start
    return start.is_complete or (
        welcome.mark > 0 and welcome.end == (start.from_seq, start.from_time_ns)
    )


def copy_manifest(copy: Copy, history: str, welcome: Welcome) -> Manifest:
    """The manifest of a copy.

    Args:
        welcome: where the replica stands: what lies between that and the copy is a gap.
    """
    start = copy.start
    cause = start.cause
    if len(cause) > MAX_CAUSE_LENGTH:
        cause = cause[: MAX_CAUSE_LENGTH - 1] + "…"
    before = welcome.end if welcome.mark else (copy.seq, copy.time_ns)
    gaps: tuple[Gap, ...] = ()
    if welcome.mark:
        gaps = (Gap(*before, copy.seq, copy.time_ns, cause),)
    return Manifest(
        mark=start.mark,
        kind=TransferKind.FULL if start.is_complete else TransferKind.CHANGES,
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
        identity=f"{FORMAT} {history} {'full' if start.is_complete else 'changes'} {start.mark}",
        gaps=gaps,
    )


def diff_frames(
    shipment: Shipment,
    source: BlockSource,
    volumes: tuple[VolumeInfo, ...],
    resume: ResumePoint,
    payload_bytes: int = MAX_PAYLOAD_BYTES,
) -> Iterator[TransferFrame]:
    """The frames of a snapshot diff behind what the replica durably has.

    Args:
        payload_bytes: of a frame at most (but a block, or a row).

    Raises:
        CorruptionError: the local journal is damaged; what was sent so far was right.
    """
    diff, interval = shipment.diff, shipment.interval
    yield from _with_checkpoints(
        _plain(Section.DIFF, diff.entries, DIFF_ENTRY.itemsize, resume, payload_bytes),
        _blocks(Section.DIFF_BLOCKS, diff.data_rows, interval, source, volumes, resume, payload_bytes),
    )
    checksums = _checksums(interval, diff.data_rows, diff.shared_rows), _checksums(interval)
    yield End((diff.entries.nbytes, diff.size_bytes, 0, 0, 0), checksums)


def layers_frames(
    picked: PickedLayers,
    source: BlockSource,
    volumes: tuple[VolumeInfo, ...],
    resume: ResumePoint,
    payload_bytes: int = MAX_PAYLOAD_BYTES,
) -> Iterator[TransferFrame]:
    """The frames of layers; as `diff_frames`."""
    interval, part, positions = picked.interval, picked.part, picked.positions
    yield from _with_checkpoints(
        _plain(Section.POSITIONS, positions, POSITION.itemsize, resume, payload_bytes),
        _plain(Section.JOURNAL, part.entries, JOURNAL_ENTRY.itemsize, resume, payload_bytes),
        _blocks(Section.JOURNAL_BLOCKS, part.data_rows, interval, source, volumes, resume, payload_bytes),
    )
    lengths = 0, 0, positions.nbytes, part.entries.nbytes, int(part.data_sizes.sum())
    yield End(lengths, (_checksums(interval), _checksums(interval, part.data_rows, part.shared_rows)))


def _checksums(interval: Interval, *rows: Rows) -> int:
    """xxh3_64 of the rows' checksums, first those of the first array."""
    return xxh3_64_intdigest(b"".join(interval.columns.checksum[each].astype("<u8").tobytes() for each in rows))


def _with_checkpoints(*parts: Iterator[Data]) -> Iterator[TransferFrame]:
    unacknowledged = 0
    for part in parts:
        for data in part:
            unacknowledged += len(data.payload)
            yield data
            if unacknowledged >= MAX_CHECKPOINT_BYTES:
                unacknowledged = 0
                yield Checkpoint(())


def _plain(
    section: Section, rows: npt.NDArray[np.void], row_bytes: int, resume: ResumePoint, payload_bytes: int
) -> Iterator[Data]:
    """Rows, in frames of whole ones."""
    step = payload_bytes // row_bytes * row_bytes
    view = _bytes(rows)
    for start in range(resume.lengths[section - 1], len(view), step):
        yield Data(section, start, view[start : start + step])


def _blocks(
    section: Section,
    rows: Rows,
    interval: Interval,
    source: BlockSource,
    volumes: tuple[VolumeInfo, ...],
    resume: ResumePoint,
    payload_bytes: int,
) -> Iterator[Data]:
    """The rows' blocks, verified, in frames of whole blocks."""
    sizes = np.array([volume.block_size for volume in volumes], dtype=np.int64)[interval.columns.volume[rows]]
    ends = np.cumsum(sizes)
    start = int(np.searchsorted(ends, resume.lengths[section - 1], side="right"))
    while start < len(rows):
        offset = int(ends[start] - sizes[start])
        stop = max(start + 1, int(np.searchsorted(ends, offset + payload_bytes, side="right")))
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
