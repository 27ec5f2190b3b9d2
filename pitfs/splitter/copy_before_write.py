"""The splitter's side of a copy: its beginning, the before-images of what it may not have read yet, its end.

The shipper copies from the backing volumes while writes go on, and the copy must be the state at its COPY_START. So
before a write overwrites a block that the replica doesn't have yet, the splitter journals the block's content. The
shipper reads a part of a volume first, and the journal then: where the journal has a before-image, that one counts;
where it has none, no write of the block had begun when the part was read.

Each function here runs between two writes, without an await: so a COPY_START and its COPY_BLOCKS are adjacent.
"""

from __future__ import annotations

from pitfs.journal.writer import Journal
from pitfs.model.record import CopyProgress, CopyStart, Mark, RecordKind, packed_checksums
from pitfs.splitter.change_bitmap import ChangeBitmap, split_bitmaps
from pitfs.splitter.state import SplitterState
from pitfs.splitter.volume import Volume


def begin_copy(
    journal: Journal, state: SplitterState, volumes: list[Volume], now_ns: int, cause: str, changes: ChangeBitmap | None
) -> None:
    """Closes what was journalled and begins a copy of the state as it is now.

    Args:
        cause: why there is a gap before it; empty for the first copy.
        changes: the blocks that may differ from the state at its base; None for a full sync.

    Raises:
        PitfsError, OSError: the journal can't be written. No copy runs then, but the state has the number and time of
            each record that was appended, so that none is given twice.
    """
    seq, time_ns = state.seq, max(now_ns, state.time_ns + 1)
    gap_from = seq, time_ns
    if state.mark:
        gap_from = changes.base if changes else (seq, state.position_time_ns)
        mark = Mark(state.mark + 1, state.position_time_ns)
        journal.append_message(mark, seq, state.time_ns)
        state.begin_interval(mark.mark)
        seq += 1
    bitmaps = [bitmap.copy() for bitmap in changes.bitmaps] if changes else []
    encoded = [bitmap.serialize() for bitmap in bitmaps]
    copy = CopyStart(state.mark + 1, *gap_from, cause, tuple(len(each) for each in encoded))
    location = journal.append_message(copy, seq, time_ns)
    state.seq, state.time_ns, state.position_time_ns = seq, time_ns, time_ns
    state.begin_interval(copy.mark)
    for index, offset, part in split_bitmaps(encoded):
        journal.append(RecordKind.COPY_BLOCKS, index, offset, 0, seq, time_ns, part)
    state.copy, state.copy_location, state.change_bitmap = copy, location, changes
    for index, volume in enumerate(volumes):
        volume.begin_copy(bitmaps[index] if changes else None)


def preserve(
    journal: Journal, state: SplitterState, index: int, volume: Volume, first: int, count: int, may_wait: bool
) -> None:
    """Journals the before-images of those of blocks [first, first + count) that the running copy may still read.

    Raises:
        NotCachedError: they must be read from the disk, and `may_wait` is false.
        PitfsError, OSError: the journal can't be written.
    """
    todo = volume.unpreserved(first, count)
    while todo:
        length = 1
        while length < len(todo) and todo[length] == todo[0] + length:
            length += 1
        size = length * volume.block_size
        image = volume.read(todo[0] * volume.block_size, size, may_wait).ljust(size, b"\0")
        covered = packed_checksums(image, volume.block_size)
        if not any(image[:64]) and not image.strip(b"\0"):
            image = b""  # zeros, as before the first write to a sparse volume, take no contents
        position = state.seq, state.time_ns
        journal.append(RecordKind.BEFORE_IMAGE, index, todo[0], length, *position, covered, image)
        volume.preserved.add_range(todo[0], todo[0] + length)
        del todo[:length]


def note_copied(state: SplitterState, volumes: list[Volume], progress: CopyProgress) -> None:
    """The replica durably has the running copy up to there; at its end no copy runs any more."""
    for index, volume in enumerate(volumes):
        if index < progress.volume:
            volume.copied_block = volume.block_count
        elif index == progress.volume:
            volume.copied_block = progress.block
        volume.preserved.remove_range(0, volume.copied_block)
    if progress.volume >= len(volumes):
        for volume in volumes:
            volume.copying = None
        state.copy = state.change_bitmap = None
