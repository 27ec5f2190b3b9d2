"""The difference of an interval against a naive model, and the patent's own example (figures 6A to 6C)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from xxhash import xxh3_64_intdigest

from pitfs.model.difference import Columns, Rows, difference_journal, snapshot_diff
from pitfs.model.ladder import LAST_LAYER, NO_LAYER, RUNGS_NS, layers_of_positions
from pitfs.model.transfer import MAX_JOURNAL_RUNS, UNIT_BYTES, Source

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

    def same(a: Rows, b: Rows | None) -> np.ndarray:  # type: ignore[type-arg]
        if b is None:
            return np.array([not any(writes[i][2]) for i in a], dtype=np.bool_)
        compared.extend(zip(a.tolist(), b.tolist(), strict=True))
        return np.array([writes[i][2] == writes[j][2] for i, j in zip(a, b, strict=True)], dtype=np.bool_)

    sizes = np.array(block_sizes, dtype=np.int64)
    zeros = np.array([checksum(bytes(size)) for size in block_sizes], dtype=np.uint64)
    diff = snapshot_diff(columns, sizes, zeros, same)
    to_time_ns = int(times[-1]) if len(times) else 0
    return diff, difference_journal(columns, times, to_time_ns, diff, sizes, zeros, same), compared


def stream(rows: Rows, writes: list[Write]) -> bytes:
    return b"".join(writes[row][2] for row in rows)


def contents(entries, fourth: bytes, journal: bytes, block_sizes: list[int], base: int = 0):  # type: ignore[no-untyped-def]
    """The content of each entry, found as the replica does: own ones stand in the order of the entries."""
    found, own = [], base
    for entry in entries:
        size, at = block_sizes[entry["volume"]], int(entry["unit"]) * UNIT_BYTES
        match entry["source"]:
            case Source.ZERO:
                found.append(bytes(size))
            case Source.JOURNAL:
                found.append(journal[own : own + size])
                own += size
            case Source.SHARED_JOURNAL:
                found.append(journal[at : at + size])
            case Source.SHARED_SNAPSHOT:
                found.append(fourth[at : at + size])
            case Source.SNAPSHOT:
                found.append((entry["volume"], entry["block"]))
    return found


def in_diff(diff, fourth: bytes, block_sizes: list[int]) -> dict[tuple[int, int], bytes]:  # type: ignore[no-untyped-def]
    """The blocks of a snapshot diff: their contents stand in the order of its rows."""
    found, at = {}, 0
    for entry in diff.entries:
        size = block_sizes[entry["volume"]]
        key = int(entry["volume"]), int(entry["block"])
        if entry["source"] == Source.ZERO:
            found[key] = bytes(size)
        elif entry["source"] == Source.SHARED_SNAPSHOT:
            place = int(entry["unit"]) * UNIT_BYTES
            found[key] = fourth[:at][place : place + size]  # of a row before
        else:
            found[key] = fourth[at : at + size]
            at += size
    return found


def image_at(entries, diff, fourth, journal, block_sizes, seq):  # type: ignore[no-untyped-def]
    """Figure 8: of each block the last content not after `seq`."""
    blocks = in_diff(diff, fourth, block_sizes)
    found, last = {}, {}
    for entry, content in zip(entries, contents(entries, fourth, journal, block_sizes), strict=True):
        key = int(entry["volume"]), int(entry["block"])
        if entry["seq"] <= seq and entry["seq"] > last.get(key, 0):
            last[key] = int(entry["seq"])
            found[key] = blocks[key] if isinstance(content, tuple) else content
    return found


def test_the_patents_example_holds_data_for_the_first_write_only() -> None:
    """a b c d become e b c f by x at 1, f at 4, e at 1: figure 6B; the intermediary at time 2 is x b c f."""
    block = {letter: letter.encode() * 512 for letter in "abcdefx"}
    third = [block["a"], block["b"], block["c"], block["d"]]
    writes = [(0, 0, block["x"]), (0, 3, block["f"]), (0, 0, block["e"])]
    diff, journal, _ = build(writes, [512])
    assert diff.entries["block"].tolist() == [0, 3]
    assert stream(diff.data_rows, writes) == block["e"] + block["f"]
    part = journal.part(NO_LAYER, LAST_LAYER)
    assert stream(part.data_rows, writes) == block["x"]
    by_seq = part.entries[np.argsort(part.entries["seq"])]
    assert by_seq["source"].tolist() == [Source.JOURNAL, Source.SNAPSHOT, Source.SNAPSHOT]
    streams = stream(diff.data_rows, writes), stream(part.data_rows, writes)
    image = list(third)
    for (_, number), content in image_at(part.entries, diff, *streams, [512], 2).items():
        image[number] = content
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
    part = journal.part(NO_LAYER, LAST_LAYER, run_bytes=int(random.choice([512, 2048, 1 << 20])))
    fourth, own = stream(diff.data_rows, writes), stream(part.data_rows, writes)
    assert len(fourth) == diff.size_bytes and len(own) == journal.data_bytes[LAST_LAYER]
    for seq in range(len(writes) + 1):
        naive = {(volume, block): content for volume, block, content in writes[:seq]}
        assert image_at(part.entries, diff, fourth, own, block_sizes, seq) == naive
    last = {(volume, block): content for volume, block, content in writes}
    assert [(e["volume"], e["block"]) for e in diff.entries] == sorted(last)
    assert in_diff(diff, fourth, block_sizes) == last


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
    assert len(journal.part(NO_LAYER, LAST_LAYER).entries) == count and (layers <= LAST_LAYER).all()
    base, entries, own = NO_LAYER, [], b""  # what the replica has
    for layer, rung_ns in enumerate(RUNGS_NS):
        assert journal.part(NO_LAYER, layer).data_sizes.sum() == journal.data_bytes[layer]
        if layer != LAST_LAYER and random.random() < 0.4:
            continue  # it goes with a finer one
        part = journal.part(base, layer, len(own), run_bytes=2048)
        added = stream(part.data_rows, writes)
        assert len(added) == part.data_sizes.sum()
        own += added
        entries.append((part.entries, len(own) - len(added)))
        base = layer
        given = (np.flatnonzero(layers <= layer) + 1).tolist()
        seqs = sorted(seq for each, _ in entries for seq in each["seq"].tolist())
        if rung_ns:
            granules = {t // rung_ns: seq for seq, t in enumerate(times_ns.tolist(), 1)}
            del granules[to_time_ns // rung_ns]
            assert given == list(granules.values())
            # No more than these need: of each block the last content in each granule.
            needed = {(b, times_ns[i] // rung_ns): i + 1 for i, (_, b, _) in enumerate(writes)}
            assert seqs == sorted(seq for (_, granule), seq in needed.items() if granule in granules)
        blocks = in_diff(diff, fourth, [512])
        found = {}
        for each, start in entries:
            for entry, content in zip(each, contents(each, fourth, own, [512], start), strict=True):
                key = 0, int(entry["block"])
                found[int(entry["seq"])] = key, blocks[key] if isinstance(content, tuple) else content
        for seq in given:
            naive = {(0, block): content for _, block, content in writes[:seq]}
            assert dict(found[each] for each in seqs if each <= seq) == naive


def test_a_content_written_twice_is_carried_once() -> None:
    a, b, c = (letter.encode() * 512 for letter in "abc")
    writes = [(0, 0, a), (0, 1, a), (0, 0, b), (0, 1, c), (0, 2, a), (0, 2, b)]
    diff, journal, compared = build(writes, [512])
    assert stream(diff.data_rows, writes) == b + c
    assert diff.entries["source"].tolist() == [Source.SNAPSHOT, Source.SNAPSHOT, Source.SHARED_SNAPSHOT]
    assert [writes[row][2] for row in diff.shared_rows] == [b]
    assert stream(journal.part(NO_LAYER, LAST_LAYER).data_rows, writes) == a
    assert compared, "equal checksums must lead to comparing bytes"


def test_an_interval_without_writes_is_empty() -> None:
    diff, journal, _ = build([], [512])
    assert len(diff.entries) == diff.size_bytes == journal.data_bytes[LAST_LAYER] == 0
    assert len(journal.part(NO_LAYER, LAST_LAYER).entries) == 0


def test_rows_ascend_in_runs_and_their_contents_come_about_in_the_order_of_writing() -> None:
    random = np.random.default_rng(3)
    writes = [(0, int(random.integers(9)), random.bytes(512)) for _ in range(400)]
    journal = build(writes, [512])[1]
    part = journal.part(NO_LAYER, LAST_LAYER, run_bytes=32 * 512)
    ranks = np.argsort(np.argsort(part.data_rows))
    assert (ranks // 32 == 12 - np.arange(391 + 25)[25:] // 32).all(), "the last ones first"
    assert runs_of(part.entries) == 13
    assert runs_of(journal.part(NO_LAYER, LAST_LAYER, run_bytes=512).entries) <= MAX_JOURNAL_RUNS


def runs_of(entries) -> int:  # type: ignore[no-untyped-def]
    keys = entries[["volume", "block", "seq"]].tolist()
    return 1 + sum(after <= before for before, after in itertools.pairwise(keys))
