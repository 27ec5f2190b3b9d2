"""The journal index against a plain search: the last entry not after a seq, for any range."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pitfs.errors import CorruptionError
from pitfs.model.position import Position
from pitfs.model.transfer import POSITION
from pitfs.store.catalog.records import Interval
from pitfs.store.index import format as journals
from pitfs.store.index.format import INDEX_ROW, IndexWriter
from pitfs.store.index.reader import JournalIndex, chunk_cache
from pitfs.store.objects.format import VERSION_1, ObjectHeader, ObjectKind, ObjectName, ObjectRecord
from pitfs.store.objects.pool import ObjectPool

HISTORY = bytes(16)
FROM_SEQ = 100


def write_index(
    directory: Path, rows: dict[int, np.ndarray], times_ns: np.ndarray, random: np.random.Generator
) -> tuple[ObjectPool, JournalIndex]:
    name = ObjectName(ObjectKind.JOURNAL_INDEX, 2).file
    fd = os.open(directory / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    writer = IndexWriter(fd)
    for volume, table in rows.items():
        for part in np.array_split(table, int(random.integers(1, 5)), axis=1):
            found = np.zeros(part.shape[1], INDEX_ROW)
            for name, column in zip(("block", "seq", "pointer", "checksum"), part, strict=True):
                found[name] = column
            found["volume"] = volume
            writer.add_rows(found)
    positions = np.empty(len(times_ns), POSITION)
    positions["seq"], positions["time_ns"] = FROM_SEQ + 1 + np.arange(len(times_ns)), times_ns
    for part in np.array_split(positions, 3):
        writer.add_positions(part)
    data_bytes, footer_bytes, checksum = writer.finish()
    os.pwrite(
        fd, ObjectHeader(ObjectKind.JOURNAL_INDEX, HISTORY, 2, data_bytes, footer_bytes, checksum).encode(), 0
    )
    os.close(fd)
    last = FROM_SEQ + len(times_ns)
    interval = Interval(2, 1, FROM_SEQ, 0, last, int(times_ns[-1]), int(times_ns[0]), 0, "", 0)
    record = ObjectRecord(name, ObjectKind.JOURNAL_INDEX, 2, data_bytes, footer_bytes, checksum)
    pool = ObjectPool(str(directory), VERSION_1, HISTORY)
    return pool, JournalIndex(pool, interval, record, chunk_cache(4))


def random_rows(random: np.random.Generator, writes: int, block_count: int) -> np.ndarray:
    """(block, seq, pointer, checksum) columns, some blocks written very often."""
    blocks = random.integers(0, block_count, writes)
    hot = random.random(writes) < 0.6
    blocks[hot] = random.integers(0, max(1, block_count // 20), int(hot.sum()))
    seqs = np.arange(FROM_SEQ + 1, FROM_SEQ + 1 + writes)
    order = np.lexsort((seqs, blocks))
    table = np.zeros((4, writes), "<u8")
    table[0], table[1] = blocks[order], seqs[order]
    table[2:] = random.integers(0, 1 << 62, (2, writes))
    return table


def last_entries(rows: np.ndarray, start: int, end: int, seq: int) -> list[tuple[int, int, int]]:
    found = {}
    for block, at, pointer, checksum in rows.T.tolist():
        if start <= block < end and at <= seq:
            found[block] = (block, pointer, checksum)
    return list(found.values())


@pytest.mark.parametrize("seed", range(8))
def test_a_range_gives_the_last_entry_of_each_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    random = np.random.default_rng(seed)
    monkeypatch.setattr(journals, "CHUNK_ROWS", int(random.choice([1, 3, 16, 2048])))
    monkeypatch.setattr(journals, "CHUNK_POSITIONS", 32)
    writes = int(random.integers(1, 600))
    rows = {volume: random_rows(random, writes, int(random.integers(1, 60))) for volume in (0, 2)}
    times_ns = np.cumsum(random.integers(1, 5, writes)).astype("<i8")
    pool, index = write_index(tmp_path, rows, times_ns, random)
    for _ in range(150):
        volume = int(random.choice([0, 2]))
        start, length = int(random.integers(0, 60)), int(random.integers(1, 60))
        seq = FROM_SEQ + int(random.integers(0, writes + 2))
        found = index.range(volume, start, start + length, seq)
        assert [tuple(map(int, entry)) for entry in zip(*found, strict=True)] == last_entries(
            rows[volume], start, start + length, seq
        )
    assert not len(index.range(1, 0, 60, FROM_SEQ + writes)[0])
    for time_ns in range(int(times_ns[0]) - 1, min(int(times_ns[-1]) + 2, 300)):
        count = int((times_ns <= time_ns).sum())
        assert index.position_at_time(time_ns) == (
            Position(FROM_SEQ + count, int(times_ns[count - 1])) if count else None
        )
        assert index.next_time(time_ns) == int(times_ns[min(count, writes - 1)])
    assert [index.position_at_seq(FROM_SEQ + 1 + i) for i in range(writes)] == [
        Position(FROM_SEQ + 1 + i, time_ns) for i, time_ns in enumerate(times_ns.tolist())
    ]
    assert index.position_at_seq(FROM_SEQ) is None
    pool.close()


def test_a_block_written_very_often_costs_no_more_than_two_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = 50_000
    table = np.zeros((4, writes), "<u8")
    table[0], table[1] = 7, np.arange(FROM_SEQ + 1, FROM_SEQ + 1 + writes)
    table[2] = table[1]
    times_ns = np.arange(1, writes + 1, dtype="<i8")
    pool, index = write_index(tmp_path, {0: table}, times_ns, np.random.default_rng(0))
    read, reads = pool.read_verified, list[int]()

    def counted(*place: Any) -> bytes:
        reads.append(1)
        return read(*place)

    monkeypatch.setattr(pool, "read_verified", counted)
    for number, seq in enumerate((FROM_SEQ + 1, FROM_SEQ + writes // 2, FROM_SEQ + writes), 1):
        assert index.range(0, 0, 512, seq)[1].tolist() == [seq]
        assert len(reads) <= 2 * number
    pool.close()


def test_a_damaged_chunk_or_sparse_index_is_noticed(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    rows, times_ns = random_rows(random, 300, 40), np.arange(1, 301, dtype="<i8")
    pool, index = write_index(tmp_path, {0: rows}, times_ns, random)
    path = tmp_path / ObjectName(ObjectKind.JOURNAL_INDEX, 2).file
    good = path.read_bytes()
    for offset in (4096, 5000, 4096 + 300 * 32 - 1):
        path.write_bytes(good[:offset] + bytes([good[offset] ^ 4]) + good[offset + 1 :])
        with pytest.raises(CorruptionError, match="checksum"):
            index.range(0, 0, 40, FROM_SEQ + 300)
    path.write_bytes(good[:-1] + b"\xff")
    record = ObjectRecord(path.name, ObjectKind.JOURNAL_INDEX, 2, 300 * 40, 80, 12345)
    with pytest.raises(CorruptionError, match="checksum"):
        JournalIndex(pool, index.interval, record, chunk_cache())
    path.write_bytes(good[:5000])
    with pytest.raises(CorruptionError, match="ends before"):
        index.range(0, 0, 40, FROM_SEQ + 300)
    pool.close()
