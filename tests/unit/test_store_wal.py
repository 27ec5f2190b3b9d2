"""The WAL of an open interval: its bytes stay what they are, a tear is cut, damage is said to be that."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from xxhash import xxh3_64_intdigest

from pitfs.errors import CorruptionError
from pitfs.model.transfer import WRITE
from pitfs.store.index.format import INDEX_ROW
from pitfs.store.objects.format import HEADER_BYTES, VERSION_1, Layout, ObjectKind, ObjectName
from pitfs.store.open_interval.wal import (
    HEAD_BYTES,
    Batch,
    RecordKind,
    WalReader,
    WriteAheadLog,
    align,
    encode_head,
)
from pitfs.store.open_interval.writes import spread

GOLDEN = Path(__file__).parents[1] / "golden"
BLOCK_SIZES = np.array([512, 1024], "<i8")
BLOCKS = [b"a" * 512, b"b" * 1024, b"c" * 1024]


def rows_of(first_ns: int) -> np.ndarray:
    return np.array([(first_ns, 7, 1, 0, 0), (first_ns + 5, 2, 3, 1, 0)], WRITE)


def checksums() -> np.ndarray:
    found = [xxh3_64_intdigest(block) for block in BLOCKS]
    return np.array([found[0], found[1], 0, found[2]], "<u8")


ZEROS = np.array([False, False, True, False])


def append(wal: WriteAheadLog, first_seq: int) -> int:
    batch = Batch(first_seq, rows_of(1000 * first_seq), checksums(), ZEROS)
    return wal.append_writes(batch, memoryview(b"".join(BLOCKS)))


@pytest.fixture
def wal(tmp_path: Path) -> Iterator[WriteAheadLog]:
    made = WriteAheadLog.create(str(tmp_path / "wal"), 9, bytes(16), VERSION_1)
    yield made
    made.close()


def read(wal: WriteAheadLog, start: int = HEADER_BYTES) -> tuple[list[int], int]:
    reader = WalReader(wal.path, wal.fd, wal.open_interval_id, 512)
    heads = list(reader.heads(start, BLOCK_SIZES))
    return [head.batch.first_seq for head in heads], reader.end


def test_heads_have_the_golden_bytes() -> None:
    writes = encode_head(9, RecordKind.WRITES, 8192, 2560, 4096, Batch(17, rows_of(1000), checksums(), ZEROS))
    run = encode_head(9, RecordKind.SORTED_RUN, 12288, 70000, 8192)
    assert len(writes) == len(run) == 512
    golden = bytes.fromhex((GOLDEN / "store-wal.hex").read_text("ascii"))
    assert writes[:145] + run[:HEAD_BYTES] == golden
    assert not any(writes[145:]) and not any(run[HEAD_BYTES:])


@pytest.mark.parametrize("unit_bytes", [1024, 4096, 65536])
def test_contents_begin_at_a_unit_of_the_store(tmp_path: Path, unit_bytes: int) -> None:
    layout = Layout(unit_bytes, 30)
    wal = WriteAheadLog.create(str(tmp_path / "wal"), 9, bytes(16), layout)
    body = memoryview(b"".join([bytes([value]) * unit_bytes for value in (1, 2, 3)]))
    sums = [xxh3_64_intdigest(body[start : start + unit_bytes]) for start in range(0, len(body), unit_bytes)]
    blocks = np.array([sums[0], sums[1], 0, sums[2]], "<u8")
    starts = []
    for seq in (1, 3):
        starts.append(wal.append_writes(Batch(seq, rows_of(1000 * seq), blocks, ZEROS), body))
        os.pwrite(wal.fd, b"p" * 777, wal.run_start())
        wal.append_run(777)
    assert all((start - HEADER_BYTES) % unit_bytes == 0 for start in starts)
    assert wal.end < HEADER_BYTES + 2 * (len(body) + unit_bytes + 2048)
    reader = WalReader(wal.path, wal.fd, 9, unit_bytes)
    heads = list(reader.heads(HEADER_BYTES, np.array([unit_bytes, unit_bytes], "<i8")))
    assert [head.body for head in heads] == starts and reader.end == wal.end
    first = layout.pointer(ObjectName(ObjectKind.JOURNAL_BLOCKS, 9), (starts[1] - HEADER_BYTES) // unit_bytes)
    rows = spread(heads[1].batch, np.array([1, 1], "<u8"), first)
    assert [layout.offset_of(pointer) for pointer in rows["pointer"][~ZEROS].tolist()] == [
        starts[1] + number * unit_bytes for number in range(3)
    ]
    wal.close()


def test_what_was_appended_is_read_again_and_sorted_runs_are_passed_over(wal: WriteAheadLog) -> None:
    starts = [append(wal, 1)]
    os.pwrite(wal.fd, b"p" * 777, wal.run_start())
    wal.append_run(777)
    starts.append(append(wal, 3))
    assert all(start % 512 == 0 for start in (*starts, wal.end))
    heads = list(WalReader(wal.path, wal.fd, 9, 512).heads(HEADER_BYTES, BLOCK_SIZES))
    assert [head.body for head in heads] == starts
    for head in heads:
        assert head.batch.rows.tolist() == rows_of(1000 * head.batch.first_seq).tolist()
        assert head.batch.checksums.tolist() == checksums().tolist()
        assert head.batch.zeros.tolist() == ZEROS.tolist()
    assert read(wal) == ([1, 3], wal.end)


def test_rows_lead_to_each_block_of_each_write(wal: WriteAheadLog) -> None:
    start = append(wal, 1)
    unit = (19 << 36) + (start - HEADER_BYTES) // 512
    rows = spread(Batch(1, rows_of(1000), checksums(), ZEROS), np.array([1, 2], "<u8"), unit)
    sums = checksums().tolist()
    wanted = [(0, 7, 1, unit, sums[0]), (1, 2, 2, unit + 1, sums[1]), (1, 3, 2, 0, 0), (1, 4, 2, unit + 3, sums[3])]
    assert rows.tolist() == np.array(wanted, INDEX_ROW).tolist()


def test_cut_at_any_byte_it_ends_where_the_last_whole_batch_does(wal: WriteAheadLog) -> None:
    ends = [wal.end]
    for seq in (1, 3, 5):
        append(wal, seq)
        ends.append(wal.end)
    for size in range(ends[-1], HEADER_BYTES - 1, -1):
        os.ftruncate(wal.fd, size)
        whole = [seq for seq, end in zip((1, 3, 5), ends[1:], strict=True) if end <= size]
        assert read(wal) == (whole, max(end for end in ends if end <= size))


def test_a_flipped_bit_is_a_tear_where_nothing_behind_it_says_that_it_was_durable(wal: WriteAheadLog) -> None:
    append(wal, 1)
    wal.sync()
    ends = [wal.end]
    for seq in (3, 5):
        append(wal, seq)  # neither was made durable: the disk may have the second without the first
        ends.append(wal.end)
    for at in range(ends[0], ends[1]):
        byte = os.pread(wal.fd, 1, at)
        os.pwrite(wal.fd, bytes([byte[0] ^ 4]), at)
        is_padding = 145 <= at - ends[0] < 512
        assert read(wal) == (([1, 3, 5], ends[2]) if is_padding else ([1], ends[0]))
        os.pwrite(wal.fd, byte, at)


def test_a_flipped_bit_before_what_says_that_it_was_durable_is_damage(wal: WriteAheadLog) -> None:
    append(wal, 1)
    end = wal.end
    wal.sync()
    append(wal, 3)
    for at in [*range(HEADER_BYTES, HEADER_BYTES + 145), *range(HEADER_BYTES + 512, end, 13)]:
        byte = os.pread(wal.fd, 1, at)
        os.pwrite(wal.fd, bytes([byte[0] ^ 4]), at)
        with pytest.raises(CorruptionError, match="acknowledged"):
            read(wal)
        os.pwrite(wal.fd, byte, at)
    assert read(wal) == ([1, 3], wal.end)


def test_a_log_that_ends_before_what_was_acknowledged_is_damage(wal: WriteAheadLog) -> None:
    append(wal, 1)
    start = wal.end
    os.ftruncate(wal.fd, start - 512)
    with pytest.raises(CorruptionError, match="shorter"):
        read(wal, start)


def test_places_are_multiples_of_512() -> None:
    assert [align(offset) for offset in (0, 1, 511, 512, 513)] == [0, 512, 512, 512, 1024]
