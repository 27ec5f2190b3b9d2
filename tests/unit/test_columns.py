"""Rows as columns: the format byte for byte, what it saves, and that no wrong columns become rows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from pitfs.link.codec.columns import ColumnDecoder, ColumnEncoder, max_columns_bytes
from pitfs.link.codec.payloads import PayloadEncoder
from pitfs.model.transfer import DIFF_ENTRY, JOURNAL_ENTRY, POSITION, ROWS, WRITE, Data, Section, Source

BEGIN_NS = 1_763_855_640 * 10**9


def test_the_format_has_the_golden_bytes() -> None:
    rows = np.array(
        [(1000, 8, 1, 0, 0), (1300, 9, 1, 0, 0), (1200, 10, 1, 0, 0), (1250, 500, 3, 1, 0)], WRITE
    )
    encoder = ColumnEncoder()
    first = encoder.encode(Section.WRITES, rows.tobytes())
    golden = (
        "12 72 31 01 00",  # time: DELTA, 2; block: DELTA, NEXT, SPARSE, 2; count: DELTA, NEXT, 1; volume: 1; reserved
        "d0 58 c7 64 07 02 00 00",  # zigzag of 1000, 300, -100, 50: low bytes, high bytes
        "09 0e d2 00 03",  # first and last row differ from one more: by 7 and by 489
        "00 01 01 02",  # 0, -1, -1, 1 beside one more
        "00 00 00 01",
    )
    assert first.hex(" ") == " ".join(golden)
    later = rows[:1].copy()
    later["time_ns"] = 1260
    second = encoder.encode(Section.WRITES, later.tobytes())  # its row before is the last one above
    assert second.hex(" ") == "11 01 01 00 00 14 08 01"
    decoder = ColumnDecoder()
    assert decoder.decode(Section.WRITES, first, rows.nbytes) == rows.tobytes()
    assert decoder.decode(Section.WRITES, second, WRITE.itemsize) == later.tobytes()


def test_places_with_holes_between_them_have_the_golden_bytes() -> None:
    rows = np.zeros(9, DIFF_ENTRY)
    rows["block"], rows["source"] = np.arange(10, 19), Source.SNAPSHOT
    rows["source"][[1, 4, 5]], rows["unit"][[1, 4, 5]] = Source.SHARED_SNAPSHOT, (40_000, 40_008, 39_992)
    golden = (
        "31 83 00 01 00",  # block: DELTA, NEXT, 1; unit: HOLES, 3; volume; source: 1; reserved
        "12 00 00 00 00 00 00 00 00",  # the first row differs from one more than none by 9
        "32 00 80 10 1f 38 00 00 01 00 00",  # rows 1, 4, 5: zigzag of 40000, 8, -16
        "01 03 01 01 03 03 01 01 01",
    )
    columns = ColumnEncoder().encode(Section.DIFF, rows.tobytes())
    assert columns.hex(" ") == " ".join(golden)
    assert ColumnDecoder().decode(Section.DIFF, columns, rows.nbytes) == rows.tobytes()


@pytest.mark.parametrize("section", ROWS)
def test_rows_of_zeros_cost_a_byte_for_each_field(section: Section) -> None:
    names = ROWS[section].names
    assert names is not None
    payload = bytes(ROWS[section].itemsize * 1000)
    assert ColumnEncoder().encode(section, payload) == bytes(len(names))
    assert ColumnDecoder().decode(section, bytes(len(names)), len(payload)) == payload


@pytest.mark.parametrize("section", ROWS)
def test_noise_comes_back_and_is_hardly_longer(section: Section) -> None:
    noise = np.random.default_rng(1).bytes(ROWS[section].itemsize * 777)
    columns = ColumnEncoder().encode(section, noise)
    assert len(columns) <= max_columns_bytes(section, len(noise))
    assert ColumnDecoder().decode(section, columns, len(noise)) == noise


def test_a_payload_without_the_one_before_it_is_not_mistaken_for_the_rows_sent() -> None:
    rows = np.array([(5, 10**18), (6, 10**18 + 1)], POSITION)
    encoder = ColumnEncoder()
    encoder.encode(Section.POSITIONS, rows.tobytes())
    later = encoder.encode(Section.POSITIONS, rows.tobytes())
    assert ColumnDecoder().decode(Section.POSITIONS, later, rows.nbytes) != rows.tobytes()


ZEROS = bytes(5)


@pytest.mark.parametrize(
    ("columns", "row_count", "message"),
    [
        (ZEROS, 0, "aren't rows"),
        (ZEROS[:4], 1, "5 fields"),
        (ZEROS + b"\0", 1, "1 bytes behind"),
        (b"\1\0\0\0\0", 1, "1 bytes of a column, 0 are there"),
        (b"\x09\0\0\0\0" + bytes(9), 1, "descriptor 0x9"),
        (b"\x20\0\0\0\0", 1, "descriptor 0x20"),  # NEXT without DELTA
        (b"\x91\0\0\0\0\0", 1, "descriptor 0x91"),  # HOLES stands alone
        (b"\xc1\0\0\0\0\0", 1, "descriptor 0xc1"),
        (b"\x40\0\0\0\0\0", 1, "descriptor 0x40"),  # a mask of nothing
        (b"\x80\0\0\0\0\0", 1, "descriptor 0x80"),
        (b"\x81\0\0\0\0\x08\0", 3, "more rows than there are"),
        (b"\x81\0\0\0\0\x07\0\0", 3, "3 bytes of a column, 2 are there"),
        (b"\x41\0\0\0\0", 9, "2 bytes of a column"),
        (b"\x41\0\0\0\0\xff\0", 3, "more rows than there are"),
        (b"\x41\0\0\0\0\x07\0\0", 3, "3 bytes of a column, 2 are there"),
        (b"\0\0\0\3\0\0\0\1", 1, "volume 65536 has more than 2 bytes"),
        (b"\0\0\x11\0\0\1", 1, "block_count 18446744073709551615 has more than 4 bytes"),
    ],
)
def test_wrong_columns_are_refused(columns: bytes, row_count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ColumnDecoder().decode(Section.WRITES, columns, row_count * WRITE.itemsize)


def test_a_length_that_is_no_whole_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="25 bytes aren't rows of 24"):
        ColumnDecoder().decode(Section.WRITES, ZEROS, 25)


# What a write costs, of 4 KiB or several blocks, some 100 µs after the one before.


def trace(kind: str, count: int) -> npt.NDArray[np.void]:
    draw = np.random.default_rng(7)
    rows = np.zeros(count, WRITE)
    rows["time_ns"] = BEGIN_NS + np.cumsum(draw.exponential(100_000, count).astype(np.int64) + 1000)
    rows["block_count"] = 1
    match kind:
        case "sequential":
            rows["block"] = 77_777 + np.arange(count)
        case "random":
            rows["block"] = draw.integers(0, 1 << 28, count)
        case "several blocks":
            rows["block"], rows["volume"] = draw.integers(0, 1 << 28, count), draw.integers(0, 3, count)
            rows["block_count"] = draw.integers(1, 32, count)
    return rows


KINDS = ("sequential", "random", "several blocks")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [20, 1000, 40_000])
def test_a_streamed_write_costs_at_most_12_bytes(kind: str, batch: int) -> None:
    rows = trace(kind, 40_000 if batch > 100 else 2000)
    encoder = PayloadEncoder()
    payloads = [rows[start : start + batch].tobytes() for start in range(0, len(rows), batch)]
    wires = [encoder.encode(Data(Section.WRITES, 1, payload)) for payload in payloads]
    assert sum(len(wire.payload) for wire in wires) <= 12 * len(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_a_write_of_an_interval_costs_at_most_12_bytes(kind: str) -> None:
    writes = trace(kind, 40_000)
    counts = writes["block_count"].astype(np.int64)
    of_write = np.repeat(np.arange(len(writes)), counts)
    journal = np.zeros(len(of_write), JOURNAL_ENTRY)
    journal["block"] = writes["block"][of_write]
    journal["block"] += (np.arange(len(of_write)) - np.repeat(np.cumsum(counts) - counts, counts)).astype(
        np.uint64
    )
    journal["seq"], journal["volume"] = 1_000_000 + of_write, writes["volume"][of_write]
    journal = journal[np.lexsort((journal["seq"], journal["block"], journal["volume"]))]
    same = (journal["block"][1:] == journal["block"][:-1]) & (journal["volume"][1:] == journal["volume"][:-1])
    last = np.append(~same, True)
    journal["source"] = np.where(last, Source.SNAPSHOT, Source.JOURNAL)
    diff = np.zeros(np.count_nonzero(last), DIFF_ENTRY)
    diff["block"], diff["volume"], diff["source"] = (
        journal["block"][last],
        journal["volume"][last],
        Source.SNAPSHOT,
    )
    positions = np.zeros(len(writes), POSITION)
    positions["seq"], positions["time_ns"] = 1_000_000 + np.arange(len(writes)), writes["time_ns"]
    encoder, total = PayloadEncoder(), 0
    for section, rows in ((Section.DIFF, diff), (Section.POSITIONS, positions), (Section.JOURNAL, journal)):
        for start in range(0, len(rows), 20_000):
            total += len(encoder.encode(Data(section, 0, rows[start : start + 20_000].tobytes())).payload)
    assert total <= 12 * len(writes)
