"""The local journal after a crash: every byte cut, every byte flipped, recycled segments, tears and damage."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from pitfs.errors import CapacityError, CorruptionError
from pitfs.journal.recovery import replay
from pitfs.journal.writer import MIN_SEGMENT_BYTES, Journal, JournalTail, Location
from pitfs.model.record import Record, RecordKind, block_checksums
from pitfs.storage.segment import DATA_OFFSET, SegmentHeader, SegmentReader, list_segments

HISTORY = bytes(range(16))
BLOCK = 512


def content(number: int) -> bytes:
    return number.to_bytes(4, "little") * (BLOCK // 4)


def append(journal: Journal, seq: int, blocks: int = 1) -> None:
    data = b"".join(content(seq * 1000 + index) for index in range(blocks))
    covered = b"".join(each.to_bytes(8, "little") for each in block_checksums(data, BLOCK))
    record = RecordKind.WRITE, 0, seq, blocks, seq, 1000 + seq, covered, data
    try:
        journal.append(*record)
    except CapacityError:
        journal.prepare_spare()
        journal.append(*record)


def recover(directory: Path) -> tuple[list[int], JournalTail | None]:
    """The seqs found, each verified, and the tail."""
    found: list[int] = []

    def visit(reader: SegmentReader, offset: int, record: Record) -> None:
        if record.kind is RecordKind.WRITE:
            data = reader.verified_contents(offset, record)
            assert data[:BLOCK] == content(record.seq * 1000)
            found.append(record.seq)

    return found, replay(str(directory), 0, visit, HISTORY)


def new_journal(directory: Path, capacity: int = 16 * MIN_SEGMENT_BYTES) -> Journal:
    directory.mkdir(exist_ok=True)
    return Journal(str(directory), HISTORY, capacity)


def segment_path(directory: Path, number: int = 1) -> Path:
    return directory / f"segment-{number:016x}.journal"


def test_a_record_writes_its_last_page_whole(tmp_path: Path) -> None:
    """Of a segment that is used again, the kernel would read what isn't written: the write would wait for the disk."""
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / "spare-1-used").write_bytes(b"\xff" * MIN_SEGMENT_BYTES)
    journal = new_journal(tmp_path / "journal")
    for seq in range(1, 40):
        append(journal, seq)
        end = journal.tail.offset
        behind = segment_path(tmp_path / "journal").read_bytes()[end : end + 8192]
        page = -end % 4096
        assert behind[:page] == bytes(page) and behind[page:] == b"\xff" * (8192 - page)
    journal.close()
    found, tail = recover(tmp_path / "journal")
    assert found == list(range(1, 40)) and tail is not None and tail.location.offset == end


@pytest.fixture
def three_records(tmp_path: Path) -> tuple[Path, list[int]]:
    """A journal with three records, none of them synced, and where each ends."""
    journal = new_journal(tmp_path / "journal")
    ends = []
    for seq in (1, 2, 3):
        append(journal, seq)
        ends.append(journal.tail.offset)
    journal.close()
    return tmp_path / "journal", ends


def test_every_cut_leaves_the_records_before_it(three_records: tuple[Path, list[int]]) -> None:
    directory, ends = three_records
    whole = segment_path(directory).read_bytes()[: ends[-1]]
    for cut in range(DATA_OFFSET, ends[-1]):
        segment_path(directory).write_bytes(whole[:cut])
        found, tail = recover(directory)
        assert found == [seq for seq, end in zip((1, 2, 3), ends, strict=True) if end <= cut]
        assert tail is not None and tail.next_lsn == len(found) + 1


def test_every_flipped_byte_cuts_there_and_never_gives_other_bytes(
    three_records: tuple[Path, list[int]],
) -> None:
    directory, ends = three_records
    whole = bytearray(segment_path(directory).read_bytes()[: ends[-1]])
    for at in range(DATA_OFFSET, ends[-1]):
        whole[at] ^= 0x5A
        segment_path(directory).write_bytes(whole)
        whole[at] ^= 0x5A
        found, _ = recover(directory)
        assert found == [seq for seq, end in zip((1, 2, 3), ends, strict=True) if end <= at]


def test_a_bad_record_that_had_been_durable_is_damage_and_nothing_is_cut(tmp_path: Path) -> None:
    directory = tmp_path / "journal"
    journal = new_journal(directory)
    append(journal, 1)
    first_end = journal.tail.offset
    append(journal, 2)
    journal.sync()
    append(journal, 3)
    journal.close()
    damaged = bytearray(segment_path(directory).read_bytes())
    damaged[first_end + 100] ^= 1
    segment_path(directory).write_bytes(damaged)
    with pytest.raises(CorruptionError, match="had been durable"):
        recover(directory)
    assert segment_path(directory).read_bytes() == damaged


def test_a_bad_record_that_was_never_durable_is_a_tear_even_before_good_ones(tmp_path: Path) -> None:
    directory = tmp_path / "journal"
    journal = new_journal(directory)
    append(journal, 1)
    journal.sync()
    first_end = journal.tail.offset
    append(journal, 2)
    append(journal, 3)
    journal.close()
    torn = bytearray(segment_path(directory).read_bytes())
    torn[first_end + 100] ^= 1
    segment_path(directory).write_bytes(torn)
    assert recover(directory)[0] == [1]


def test_records_go_on_over_segments_and_after_recovery(tmp_path: Path) -> None:
    directory = tmp_path / "journal"
    journal = new_journal(directory)
    count = 0
    while len(list_segments(str(directory))) < 4:
        count += 1
        append(journal, count, blocks=500)
    journal.close()
    found, tail = recover(directory)
    assert found == list(range(1, count + 1)) and tail is not None
    journal = Journal(str(directory), HISTORY, 16 * MIN_SEGMENT_BYTES, tail)
    while len(list_segments(str(directory))) < 6:
        count += 1
        append(journal, count, blocks=500)
    journal.sync()
    journal.close()
    assert recover(directory)[0] == list(range(1, count + 1))


def test_a_recycled_segments_former_records_are_not_found(tmp_path: Path) -> None:
    directory = tmp_path / "journal"
    journal = new_journal(directory)
    count = 0
    while len(list_segments(str(directory))) < 3:
        count += 1
        append(journal, count, blocks=700)
    journal.sync()
    journal.release(3)
    assert list_segments(str(directory)) == [3] and not journal.needs_spare
    while len(list_segments(str(directory))) < 2:
        count += 1
        append(journal, count, blocks=700)
    last = journal.tail
    journal.close()
    found: list[int] = []
    tail = replay(str(directory), 3, lambda _r, _o, record: found.append(record.seq), HISTORY)
    assert tail is not None and tail.location == last
    # What the file held before still stands behind the tail, under another seed.
    assert any(segment_path(directory, 4).read_bytes()[last.offset :])


def test_a_successor_without_its_seal_is_cut(tmp_path: Path) -> None:
    """The new segment's name reached the disk, the SEAL before it didn't."""
    directory = tmp_path / "journal"
    journal = new_journal(directory)
    count = 0
    while len(list_segments(str(directory))) < 2:
        count += 1
        before = journal.tail
        append(journal, count, blocks=900)
    journal.close()
    with open(segment_path(directory, 1), "r+b") as file:
        file.seek(before.offset)
        file.write(bytes(64))
    found, tail = recover(directory)
    assert found == list(range(1, count))
    assert tail is not None and tail.location == Location(1, before.offset)
    assert list_segments(str(directory)) == [1]


def rolled(directory: Path) -> tuple[int, Path]:
    """A journal whose last segment holds nothing yet but its header; how many records, and its path."""
    journal = new_journal(directory)
    count = 0
    while len(list_segments(str(directory))) < 2:
        count += 1
        append(journal, count, blocks=900)
    last, offset = segment_path(directory, 2), DATA_OFFSET
    journal.close()
    with open(last, "r+b") as file:  # the record that made it roll
        file.seek(offset)
        file.write(bytes(1 << 20))
    return count - 1, last


@pytest.mark.parametrize("header", ["blank", "of its former use"])
def test_a_successor_without_its_header_is_cut_and_the_journal_goes_on(tmp_path: Path, header: str) -> None:
    """Power was lost behind a roll: SEAL and name are on the disk, the new segment's header isn't."""
    directory = tmp_path / "journal"
    count, last = rolled(directory)
    former = SegmentHeader(1, 7, 1, MIN_SEGMENT_BYTES, HISTORY).encode()
    with open(last, "r+b") as file:
        file.write(bytes(DATA_OFFSET) if header == "blank" else former)
    for _ in range(3):  # each time it starts again, writes, and stops
        found, tail = recover(directory)
        assert found == list(range(1, count + 1)) and tail is not None
        journal = Journal(str(directory), HISTORY, 16 * MIN_SEGMENT_BYTES, tail)
        for _ in range(5):
            count += 1
            append(journal, count, blocks=900)
        journal.sync()
        journal.close()
    assert recover(directory)[0] == list(range(1, count + 1))


def test_damage_before_the_last_fsync_but_one_is_no_tear(tmp_path: Path) -> None:
    """The records right behind the bad one were written before any fsync: a later one tells."""
    directory = tmp_path / "journal"
    journal = new_journal(directory)
    ends = [DATA_OFFSET]
    for count in (100, 10):
        for _ in range(count):
            append(journal, len(ends))
            ends.append(journal.tail.offset)
        journal.sync()
    journal.close()
    damaged = bytearray(segment_path(directory).read_bytes())
    damaged[ends[9] + 100] ^= 1
    segment_path(directory).write_bytes(damaged)
    with pytest.raises(CorruptionError, match="record 10 had been durable"):
        recover(directory)


def test_a_damaged_header_is_no_tear(tmp_path: Path) -> None:
    directory = tmp_path / "journal"
    _, last = rolled(directory)
    with open(last, "r+b") as file:
        file.seek(20)
        file.write(b"\xff")
    before = {path: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(CorruptionError, match="no header"):
        recover(directory)
    assert {path: path.read_bytes() for path in directory.iterdir()} == before


def test_what_a_checkpoint_counts_on_is_never_cut(three_records: tuple[Path, list[int]]) -> None:
    directory, ends = three_records
    whole = bytearray(segment_path(directory).read_bytes())
    whole[ends[1] + 10] ^= 1
    segment_path(directory).write_bytes(whole)
    with pytest.raises(CorruptionError, match="record 3 had been durable"):
        replay(str(directory), 0, lambda *_: None, HISTORY, 3)
    assert replay(str(directory), 0, lambda *_: None, HISTORY, 2) is not None


def test_a_file_whose_renaming_was_lost_is_damage(tmp_path: Path) -> None:
    directory = tmp_path / "journal"
    rolled(directory)
    os.replace(segment_path(directory, 2), segment_path(directory, 1))
    with pytest.raises(CorruptionError, match="holds segment 0000000000000002"):
        recover(directory)


def test_the_segment_of_the_checkpoint_must_be_there(tmp_path: Path) -> None:
    directory = tmp_path / "journal"
    rolled(directory)
    os.unlink(segment_path(directory, 1))
    with pytest.raises(CorruptionError, match="missing"):
        replay(str(directory), 1, lambda *_: None, HISTORY)


def test_a_missing_segment_is_damage(tmp_path: Path) -> None:
    directory = tmp_path / "journal"
    journal = new_journal(directory)
    count = 0
    while len(list_segments(str(directory))) < 4:
        count += 1
        append(journal, count, blocks=900)
    journal.close()
    os.unlink(segment_path(directory, 2))
    with pytest.raises(CorruptionError, match="missing"):
        recover(directory)


def test_beyond_the_capacity_nothing_is_appended(tmp_path: Path) -> None:
    journal = new_journal(tmp_path / "journal", 4 * MIN_SEGMENT_BYTES)
    count = 0
    with pytest.raises(CapacityError, match="capacity"):
        while True:
            append(journal, count + 1, blocks=900)
            count += 1
    journal.close()
    assert recover(tmp_path / "journal")[0] == list(range(1, count + 1))


def test_another_groups_segment_is_refused(tmp_path: Path) -> None:
    journal = new_journal(tmp_path / "journal")
    append(journal, 1)
    journal.close()
    shutil.copytree(tmp_path / "journal", tmp_path / "other")
    with pytest.raises(CorruptionError, match="another group"):
        replay(str(tmp_path / "other"), 0, lambda *_: None, bytes(16))
