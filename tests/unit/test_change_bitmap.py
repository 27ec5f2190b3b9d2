"""The change bitmap by itself: its limit, its parts in the journal, what it takes."""

from __future__ import annotations

import numpy as np
import pytest
from pyroaring import BitMap64

from pitfs.errors import CorruptionError
from pitfs.journal.writer import segment_bytes_for
from pitfs.model.bitmap import CONTAINER_BYTES, bitmap_bytes
from pitfs.model.record import MAX_MESSAGE_BYTES, CopyStart, Record, RecordKind
from pitfs.splitter.change_bitmap import BitmapAssembler, ChangeBitmap, bitmap_limit_bytes, split_bitmaps


def changes(limit_bytes: int = 1 << 20, volumes: int = 1) -> ChangeBitmap:
    return ChangeBitmap((0, 0), [BitMap64() for _ in range(volumes)], limit_bytes)


def strewn(count: int) -> BitMap64:
    random = np.random.default_rng(1)
    return BitMap64(random.integers(0, 1 << 26, count).tolist())


def record(volume: int, body: bytes, kind: RecordKind = RecordKind.COPY_BLOCKS) -> Record:
    return Record(kind, volume, 0, 0, 0, 0, 0, 0, body, 64, 64 + len(body))


def test_blocks_strewn_anywhere_take_two_bytes_each_and_runs_next_to_nothing() -> None:
    one = changes()
    assert one.add([strewn(100_000)])
    containers = -(-(1 << 26) // 65536)
    assert bitmap_bytes(one.bitmaps) <= 2 * 100_000 + CONTAINER_BYTES * containers
    whole = changes(limit_bytes=2 << 20)
    assert whole.mark(0, 0, 1 << 30)
    assert whole.fits() and bitmap_bytes(whole.bitmaps) < (1 << 30) // 65536 * (CONTAINER_BYTES + 16)


def test_at_the_worst_it_takes_a_bit_for_each_block() -> None:
    one = changes()
    one.add([BitMap64(range(0, 1 << 22, 2))])  # every other block: no runs
    assert (1 << 22) // 8 <= bitmap_bytes(one.bitmaps) <= (1 << 22) // 8 + CONTAINER_BYTES * 64


def test_beyond_the_limit_it_says_so_and_runs_are_no_reason() -> None:
    random = np.random.default_rng(2)
    one, marks = changes(limit_bytes=100_000), 0
    while one.mark(0, int(random.integers(1 << 30)), 1):
        marks += 1
        assert marks < 100_000
    assert marks > 1000
    for block in range(0, 1 << 20, 2):  # half of it, then the other: one run in the end
        one = one if block else changes(limit_bytes=100_000)
        one.bitmaps[0].add(block)
    assert not one.fits()
    for block in range(1, 1 << 20, 2):
        one.bitmaps[0].add(block)
    assert one.fits()


def test_what_may_be_remembered_fits_into_a_segment_of_any_journal() -> None:
    for capacity in (16 << 20, 100 << 20, 1 << 30, 1 << 40):
        assert 4 * bitmap_limit_bytes(capacity) <= segment_bytes_for(capacity)
    assert bitmap_limit_bytes(1 << 30) == 16 << 20


def test_in_pieces_and_put_together_it_is_the_same() -> None:
    bitmaps = [strewn(150_000), BitMap64(), BitMap64([3])]
    encoded = [bitmap.serialize() for bitmap in bitmaps]
    found = list(split_bitmaps(encoded))
    assert len(found) == 2 + len(encoded[0]) // MAX_MESSAGE_BYTES + 1 > 4
    assert all(len(body) <= MAX_MESSAGE_BYTES for _, _, body in found)
    start = CopyStart(1, 0, 0, "", tuple(len(each) for each in encoded))
    together, without_one = BitmapAssembler(start), BitmapAssembler(start)
    for number, (volume, _, body) in enumerate(found):
        together.add(record(volume, body))
        together.add(record(volume, body, RecordKind.WRITE))
        if number != 1:
            without_one.add(record(volume, body))
    assert together.bitmaps("here") == bitmaps
    with pytest.raises(CorruptionError, match="here: damaged at byte 0: the list of changed blocks"):
        without_one.bitmaps("here")
