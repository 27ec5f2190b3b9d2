"""The splitter's side of a copy: where it begins, and the before-images of what it may not have read yet.

Each of these is done between two writes, without an await: a COPY_START and what goes with it stand together.
"""

from __future__ import annotations

import struct

import msgspec

from pitfs.journal.writer import Journal
from pitfs.model.record import CopyStart, Mark, RecordKind, block_checksums
from pitfs.splitter.change_bitmap import ChangeBitmap, pieces
from pitfs.splitter.state import SplitterState
from pitfs.splitter.volume import Volume


def begin_copy(
    journal: Journal,
    standing: SplitterState,
    volumes: list[Volume],
    now_ns: int,
    cause: str,
    changes: ChangeBitmap | None,
) -> None:
    """Closes what was journalled and begins a copy of the state as it is now.

    Args:
        cause: why there is a gap before it; empty for the first copy.
        changes: all that may differ from the state at their base; None: a complete copy.

    Raises:
        PitfsError, OSError: the journal can't be written; no copy runs, but numbers and times that it has are given.
    """
    seq, time_ns = standing.seq, max(now_ns, standing.time_ns + 1)
    gap_from = seq, time_ns
    if standing.mark:
        gap_from = changes.base if changes else (seq, standing.position_time_ns)
        mark = Mark(standing.mark + 1, standing.position_time_ns)
        journal.append_message(RecordKind.MARK, seq, standing.time_ns, msgspec.msgpack.encode(mark))
        standing.mark, seq = mark.mark, seq + 1
    bitmaps = [bitmap.copy() for bitmap in changes.bitmaps] if changes else []
    encoded = [bitmap.serialize() for bitmap in bitmaps]
    copy = CopyStart(standing.mark + 1, *gap_from, cause, tuple(len(each) for each in encoded))
    location = journal.append_message(RecordKind.COPY_START, seq, time_ns, msgspec.msgpack.encode(copy))
    standing.seq, standing.time_ns, standing.position_time_ns, standing.mark = seq, time_ns, time_ns, copy.mark
    for index, at, piece in pieces(encoded):
        journal.append(RecordKind.COPY_BLOCKS, index, at, 0, seq, time_ns, piece)
    standing.copy, standing.copy_location, standing.change_bitmap = copy, location, changes
    for index, volume in enumerate(volumes):
        volume.begin_copy(bitmaps[index] if changes else None)


def preserve(
    journal: Journal, standing: SplitterState, index: int, volume: Volume, first: int, count: int, may_wait: bool
) -> None:
    """Keeps the before-images of blocks [first, first + count) that the running copy may not have read yet.

    Raises:
        NotCachedError: they would have to come from the disk, and may not.
        PitfsError, OSError: the journal can't be written.
    """
    todo = volume.unpreserved(first, count)
    while todo:
        length = 1
        while length < len(todo) and todo[length] == todo[0] + length:
            length += 1
        size = length * volume.block_size
        image = volume.read(todo[0] * volume.block_size, size, may_wait).ljust(size, b"\0")
        covered = struct.pack(f"<{length}Q", *block_checksums(image, volume.block_size))
        if not any(image[:64]) and not image.strip(b"\0"):
            image = b""  # zeros, as before the first write to a sparse volume: said without contents
        journal.append(
            RecordKind.BEFORE_IMAGE, index, todo[0], length, standing.seq, standing.time_ns, covered, image
        )
        volume.preserved.add_range(todo[0], todo[0] + length)
        del todo[:length]
