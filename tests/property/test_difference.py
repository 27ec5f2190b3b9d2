"""The difference of an interval against a naive model, and the patent's own example (figures 6A to 6C)."""

from __future__ import annotations

import numpy as np
import pytest
from xxhash import xxh3_64_intdigest

from pitfs.model.difference import Columns, Contents, Rows, difference_journal, entries_at, snapshot_diff
from pitfs.model.ladder import LAST_LAYER, RUNGS_NS, layers_of_positions
from pitfs.model.transfer import UNIT_BYTES, Source

Write = tuple[int, int, bytes]  # volume, block, content


def build(  # type: ignore[no-untyped-def]
    writes: list[Write], block_sizes: list[int], checksum=xxh3_64_intdigest, times_ns=None
):
    """The difference of writes with seq 1, 2, 3 …, one block each."""
    times = np.arange(1, len(writes) + 1, dtype=np.int64) if times_ns is None else times_ns
    columns = Columns(
        np.array([volume for volume, _, _ in writes], dtype=np.uint16),
        np.array([block for _, block, _ in writes], dtype=np.int64),
        np.arange(1, len(writes) + 1, dtype=np.int64),
        np.array([checksum(content) for _, _, content in writes], dtype=np.uint64),
    )
    compared: list[tuple[int, int]] = []

    def same(a: Rows, b: Rows) -> np.ndarray:  # type: ignore[type-arg]
        compared.extend(zip(a.tolist(), b.tolist(), strict=True))
        return np.array([writes[i][2] == writes[j][2] for i, j in zip(a, b, strict=True)], dtype=np.bool_)

    contents = Contents(same, lambda a: np.array([not any(writes[i][2]) for i in a], dtype=np.bool_))
    sizes = np.array(block_sizes, dtype=np.int64)
    zeros = np.array([checksum(bytes(size)) for size in block_sizes], dtype=np.uint64)
    diff = snapshot_diff(columns, sizes, zeros, contents)
    to_time_ns = int(times[-1]) if len(times) else 0
    return diff, difference_journal(columns, times, to_time_ns, diff, sizes, zeros, contents), compared


def stream(rows: Rows, writes: list[Write]) -> bytes:
    return b"".join(writes[row][2] for row in rows)


def content_of(entry: np.void, streams: dict[int, bytes], block_sizes: list[int]) -> bytes:
    size = block_sizes[entry["volume"]]
    if entry["source"] == Source.ZERO:
        return bytes(size)
    at = int(entry["unit"]) * UNIT_BYTES
    return streams[int(entry["source"])][at : at + size]


def test_the_patents_example_holds_data_for_the_first_write_only() -> None:
    """a b c d become e b c f by x at 1, f at 4, e at 1: figure 6B; the intermediary at time 2 is x b c f."""
    block = {letter: letter.encode() * 512 for letter in "abcdefx"}
    third = [block["a"], block["b"], block["c"], block["d"]]
    writes = [(0, 0, block["x"]), (0, 3, block["f"]), (0, 0, block["e"])]
    diff, journal, _ = build(writes, [512])
    assert diff.entries["block"].tolist() == [0, 3]
    assert stream(diff.data_rows, writes) == block["e"] + block["f"]
    assert stream(journal.data_rows, writes) == block["x"]
    by_seq = journal.entries[np.argsort(journal.entries["seq"])]
    assert by_seq["source"].tolist() == [Source.JOURNAL, Source.FOURTH, Source.FOURTH]
    streams = {
        Source.FOURTH: stream(diff.data_rows, writes),
        Source.JOURNAL: stream(journal.data_rows, writes),
    }
    image = list(third)
    for entry in entries_at(journal.entries, 2):
        image[entry["block"]] = content_of(entry, streams, [512])
    assert image == [block["x"], block["b"], block["c"], block["f"]]


@pytest.mark.parametrize("seed", range(60))
def test_every_seq_reads_what_the_naive_model_has(seed: int) -> None:
    random = np.random.default_rng(seed)
    block_sizes = [512, 1024, 512][: int(random.integers(1, 4))]
    pool = [random.bytes(1024) for _ in range(4)] + [bytes(1024)]
    # A checksum of one bit: most rows collide, so only the bytes can tell.
    weak = seed % 3 == 0
    checksum = (lambda data: xxh3_64_intdigest(data) & 1) if weak else xxh3_64_intdigest
    writes: list[Write] = []
    for _ in range(int(random.integers(0, 80))):
        volume = int(random.integers(len(block_sizes)))
        writes.append(
            (volume, int(random.integers(6)), pool[random.integers(len(pool))][: block_sizes[volume]])
        )
    diff, journal, _ = build(writes, block_sizes, checksum)
    streams = {
        Source.FOURTH: stream(diff.data_rows, writes),
        Source.JOURNAL: stream(journal.data_rows, writes),
    }
    assert (
        len(streams[Source.FOURTH]) == diff.size_bytes and len(streams[Source.JOURNAL]) == journal.size_bytes
    )
    for seq in range(len(writes) + 1):
        naive = {(volume, block): content for volume, block, content in writes[:seq]}
        found = {
            (int(entry["volume"]), int(entry["block"])): content_of(entry, streams, block_sizes)
            for entry in entries_at(journal.entries, seq)
        }
        assert found == naive
    last = {(volume, block): content for volume, block, content in writes}
    assert [(e["volume"], e["block"]) for e in diff.entries] == sorted(last)
    for entry in diff.entries:
        assert content_of(entry, streams, block_sizes) == last[entry["volume"], entry["block"]]


@pytest.mark.parametrize("seed", range(30))
def test_each_rung_gives_the_ends_of_its_granules(seed: int) -> None:
    random = np.random.default_rng([seed, 5])
    pool = [random.bytes(512) for _ in range(6)] + [bytes(512)]
    count = int(random.integers(1, 120))
    writes = [(0, int(random.integers(8)), pool[random.integers(len(pool))]) for _ in range(count)]
    times_ns = np.cumsum(random.integers(1, int(random.choice([2e6, 5e7, 4e8])), count)) + 10**18
    diff, journal, _ = build(writes, [512], times_ns=times_ns)
    fourth, to_time_ns = stream(diff.data_rows, writes), int(times_ns[-1])
    layers = layers_of_positions(times_ns, to_time_ns)
    whole = stream(journal.data_rows, writes)
    assert len(journal.up_to(LAST_LAYER).entries) == count and (layers <= LAST_LAYER).all()
    for layer, rung_ns in enumerate(RUNGS_NS):
        part = journal.up_to(layer)
        streams = {Source.FOURTH: fourth, Source.JOURNAL: stream(part.data_rows, writes)}
        assert len(streams[Source.JOURNAL]) == part.size_bytes
        assert whole.startswith(streams[Source.JOURNAL]), "a finer rung adds behind"
        given = (np.flatnonzero(layers <= layer) + 1).tolist()
        if rung_ns:
            granules = {t // rung_ns: seq for seq, t in enumerate(times_ns.tolist(), 1)}
            del granules[to_time_ns // rung_ns]
            assert given == list(granules.values())
            # No more than these need: of each block the last content in each granule.
            needed = {(b, times_ns[i] // rung_ns): i + 1 for i, (_, b, _) in enumerate(writes)}
            wanted = sorted(seq for (_, granule), seq in needed.items() if granule in granules)
            assert sorted(part.entries["seq"].tolist()) == wanted
        for seq in given:
            naive = {(0, block): content for _, block, content in writes[:seq]}
            found = {
                (0, int(entry["block"])): content_of(entry, streams, [512])
                for entry in entries_at(part.entries, seq)
            }
            assert found == naive


def test_a_content_written_twice_is_carried_once() -> None:
    a, b, c = (letter.encode() * 512 for letter in "abc")
    writes = [(0, 0, a), (0, 1, a), (0, 0, b), (0, 1, c), (0, 2, a), (0, 2, b)]
    diff, journal, compared = build(writes, [512])
    assert stream(diff.data_rows, writes) == b + c + b
    assert stream(journal.data_rows, writes) == a
    assert compared, "equal checksums must lead to comparing bytes"


def test_an_interval_without_writes_is_empty() -> None:
    diff, journal, _ = build([], [512])
    assert len(diff.entries) == len(journal.entries) == diff.size_bytes == journal.size_bytes == 0
