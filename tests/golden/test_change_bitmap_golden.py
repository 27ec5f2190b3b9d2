"""Golden bytes of the change bitmaps: a change here is a change of the format, and needs a new version."""

from __future__ import annotations

from pathlib import Path

import msgspec
from pyroaring import BitMap64
from xxhash import xxh3_64_intdigest

from pitfs.model.record import CopyStart, RecordKind
from pitfs.splitter.change_bitmap import FILE, ChangeBitmap, load_bitmap, save_bitmap, split_bitmaps

CHANGES_FILE = bytes.fromhex(
    "83a6666f726d617401a4626173659207cd04d2a76269746d61707392c4380200000000000000000000003a3000000100"
    "00000000020010000000010002000500020000003a3000000100000000000000100000000000c4080000000000000000"
)
COPY_START = bytes.fromhex(
    "85a46d61726b03a866726f6d5f73657107ac66726f6d5f74696d655f6e73cd04d2a56361757365a466756c6cac626974"
    "6d61705f6279746573923808"
)


def changes() -> ChangeBitmap:
    return ChangeBitmap((7, 1234), [BitMap64([1, 2, 5, 1 << 33]), BitMap64()], 1 << 20)


def test_the_file_is_these_bytes(tmp_path: Path) -> None:
    checksum = save_bitmap(str(tmp_path), changes())
    content = (tmp_path / FILE).read_bytes()
    assert content == CHANGES_FILE and checksum == xxh3_64_intdigest(content)
    kept = load_bitmap(str(tmp_path), checksum, 2, 1 << 20)
    assert kept is not None and (kept.base, kept.bitmaps) == ((7, 1234), changes().bitmaps)


def test_a_copy_of_changes_begins_with_these_bytes() -> None:
    encoded = [bitmap.serialize() for bitmap in changes().bitmaps]
    start = CopyStart(3, 7, 1234, "full", tuple(len(each) for each in encoded))
    assert msgspec.msgpack.encode(start) == COPY_START
    assert list(split_bitmaps(encoded)) == [(0, 0, encoded[0]), (1, 0, encoded[1])]
    assert int(RecordKind.COPY_BLOCKS) == 7
