"""Golden bytes of the local journal: a change here is a change of the format, and needs a new version."""

from __future__ import annotations

import pytest

from pitfs.errors import CorruptionError, StoreVersionError
from pitfs.model.record import RecordKind, decode_head, encode_head
from pitfs.storage.segment import DATA_OFFSET, SegmentHeader, segment_name, segment_number

RECORD = bytes.fromhex(
    "504a523101000200020000001002000007000000000000002a00000000000000"
    "15cd5b07000000000900000000000000080000000000000091176466afa31aae"
)
SEGMENT = bytes.fromhex(
    "50495446534a4e4c010000000000000003000000000000000df0adba00000000"
    "0700000000000000000040000000000000010203040506070809000102030405"
    "fbf59e2071739445"
)
COVERED = bytes(range(16))


def encoded() -> bytes:
    return encode_head(RecordKind.WRITE, 2, 7, 2, 42, 123456789, 9, 8, COVERED, 512, seed=0x1234)


def header() -> SegmentHeader:
    return SegmentHeader(3, 0xBAADF00D, 7, 4 << 20, bytes([*range(10), *range(6)]))


def test_a_records_bytes_are_these() -> None:
    assert encoded()[:64] == RECORD
    assert encoded()[64:] == COVERED


def test_a_segments_header_is_these_bytes() -> None:
    assert header().encode()[: len(SEGMENT)] == SEGMENT
    assert len(header().encode()) == DATA_OFFSET
    assert SegmentHeader.decode(header().encode(), "x") == header()


def test_a_record_decodes_to_what_was_encoded_and_only_with_its_seed() -> None:
    record = decode_head(encoded(), 0, 0x1234, "x", 0)
    assert (record.kind, record.volume, record.block, record.block_count) == (RecordKind.WRITE, 2, 7, 2)
    assert (record.seq, record.time_ns, record.lsn, record.durable_lsn) == (42, 123456789, 9, 8)
    assert record.covered == COVERED and record.size_bytes == 64 + 16 + 512
    with pytest.raises(CorruptionError):
        decode_head(encoded(), 0, 0x1235, "x", 0)


def test_a_newer_segment_is_refused_by_name() -> None:
    from xxhash import xxh3_64_intdigest

    data = bytearray(header().encode())
    data[8] = 2
    data[64:72] = xxh3_64_intdigest(bytes(data[:64])).to_bytes(8, "little")
    with pytest.raises(StoreVersionError, match="format 2"):
        SegmentHeader.decode(bytes(data), "x")


def test_segment_names_sort_by_number() -> None:
    names = [segment_name(number) for number in (1, 15, 16, 255, 1 << 40)]
    assert names == sorted(names) and [segment_number(name) for name in names] == [1, 15, 16, 255, 1 << 40]
    assert segment_number("segment-1.journal") is None and segment_number("spare-1") is None
