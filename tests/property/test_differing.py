"""Where two instants differ: what comparing the two images byte by byte says, at a cost that history doesn't change."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pitfs.model.transfer import VolumeInfo
from pitfs.store import blocks
from pitfs.store.ingest import Ingest
from pitfs.store.objects.pool import ObjectPool
from pitfs.store.store import Store
from pitfs.view.differences import Difference, bitmap
from tests.helpers.histories import unsynced
from tests.helpers.stores import ingest_transfer
from tests.helpers.streams import FakeClock, batch_of, mark_of
from tests.helpers.transfers import History, random_history, random_transfers


@pytest.fixture(autouse=True)
def disk_that_needs_no_sync() -> Iterator[None]:
    with unsynced():
        yield


def naive(one: bytes, other: bytes, block_size: int) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    for start in range(0, len(one), block_size):
        end = min(start + block_size, len(one))
        if one[start:end] != other[start:end]:
            if ranges and ranges[-1][1] == start:
                start = ranges.pop()[0]
            ranges.append((start, end))
    return ranges


def assert_differences(store: Store, history: History, seqs: tuple[int, int]) -> None:
    states = [store.at_seq(seq) for seq in seqs]
    for volume, info in enumerate(history.volumes):
        images = [history.states[seq][volume] for seq in seqs]
        difference = Difference(store, *states, volume)
        assert list(difference.ranges(difference.leaves())) == naive(*images, info.block_size)
        bits = bytearray(-(-info.block_count // 4096) * 512)
        for leaf in difference.leaves():
            bits[leaf.first // 8 : leaf.first // 8 + 64] = bitmap(leaf)
        blocks = [start for a, b in naive(*images, info.block_size) for start in range(a, b, info.block_size)]
        assert np.flatnonzero(np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")).tolist() == [
            start // info.block_size for start in blocks
        ]


@pytest.mark.parametrize("seed", range(5))
def test_any_two_instants_differ_where_their_images_do(tmp_path: Path, seed: int) -> None:
    history = random_history(seed)
    random = np.random.default_rng([seed, 5])
    ingest = Ingest(str(tmp_path), history.hello, FakeClock())
    for transfer in random_transfers(history, 5, max_writes=12):
        ingest_transfer(ingest, transfer, seed)
    for number in range(2):  # an open interval, and one behind an interval that may be being closed
        for _ in range(8):
            history.write()
        ingest.write(batch_of(history.open))
        ingest.publish()
        history.reachable |= {write.seq for write in history.open}
        if not number:
            ingest.mark(mark_of(history))
    store = Store.open(ingest.path)
    pairs = np.array([*itertools.product(sorted(history.reachable), repeat=2)])
    for seqs in random.permutation(pairs)[:60].tolist():
        assert_differences(store, history, tuple(seqs))
    store.close()
    ingest.close()


@pytest.mark.parametrize("is_open", [False, True])
def test_what_two_instants_share_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_open: bool) -> None:
    history = History(1, (VolumeInfo("a", 5_000 * 512, 512),))
    ingest = Ingest(str(tmp_path), history.hello, FakeClock())
    ingest_transfer(ingest, history.close_interval())
    for count in range(12):
        history.write_blocks(0, (count * 700) % 5_000, [bytes([count]) * 512])
        if is_open and count == 11:
            ingest.write(batch_of(history.open))
            ingest.publish()
        else:
            ingest_transfer(ingest, history.close_interval())
    loads: list[int] = []
    node_loader = blocks.node_loader

    def noting(objects: ObjectPool) -> Any:
        real = node_loader(objects)

        def load(pointer: int, checksum: int) -> Any:
            loads.append(pointer)
            return real(pointer, checksum)

        return load

    monkeypatch.setattr(blocks, "node_loader", noting)
    store = Store.open(ingest.path)
    read = []
    for one, other in ((11, 12), (1, 2), (2, 1), (5, 5), (1, 12)):
        before = len(loads)
        difference = Difference(store, store.at_seq(one), store.at_seq(other), 0)
        images = history.states[one][0], history.states[other][0]
        assert list(difference.ranges(difference.leaves())) == naive(*images, 512)
        read.append(len(loads) - before)
    # For a leaf the way to its two tables, and both roots before and behind it. The map has 10 leaves.
    assert read[:4] == [4 if is_open else 4 + 2 + 2, 4 + 2 + 2, 4 + 2 + 2, 0]
    assert read[4] <= 10 * (4 + 2) + 2
    store.close()
    ingest.close()
