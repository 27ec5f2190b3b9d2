"""Where an image has data: the same as asking leaf by leaf, in every state, and nothing where there are holes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from pitfs.model.transfer import VolumeInfo
from pitfs.store.catalog import database
from pitfs.store.ingest import Ingest
from pitfs.store.store import Resolution, Store
from pitfs.view.view import PointInTimeView
from tests.helpers.stores import ingest_transfer
from tests.helpers.streams import FakeClock, batch_of, mark_of
from tests.helpers.transfers import History


@pytest.fixture(autouse=True)
def disk_that_needs_no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd: None)
    monkeypatch.setattr(database, "DURABLE", "OFF")
    monkeypatch.setattr(database, "NOT_DURABLE", "OFF")


def naive(store: Store, resolution: Resolution, volume: int, start: int, end: int) -> list[tuple[int, int]]:
    info = store.volumes[volume]
    is_data = np.zeros(info.block_count * info.block_size + 1, np.bool_)
    for leaf in range(-(-info.block_count // 512)):
        for block in np.flatnonzero(store.leaf(resolution, volume, leaf)[0]).tolist():
            at = (leaf * 512 + block) * info.block_size
            is_data[at : at + info.block_size] = True
    is_data[:start] = is_data[min(end, info.size_bytes) :] = False
    edges = np.flatnonzero(np.diff(is_data, prepend=False))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize("seed", range(4))
def test_ranges_are_those_of_the_pointers_in_every_state_and_from_any_byte_on(tmp_path: Path, seed: int) -> None:
    volumes = VolumeInfo("a", 5_000 * 512 - 100, 512), VolumeInfo("b", 9 * 4096, 4096)
    history = History(seed, volumes)
    random = np.random.default_rng(seed)
    ingest = Ingest(str(tmp_path), history.hello, FakeClock())
    ingest_transfer(ingest, history.close_interval())

    def write() -> None:
        for _ in range(4):
            history.write()
        start = int(random.integers(4_000))
        history.write_blocks(0, start, [bytes(512)] * min(int(random.integers(1_500)) + 1, 5_000 - start))

    store = Store.open(ingest.path)
    for round_ in range(3):
        write()
        if round_ < 2:
            ingest_transfer(ingest, history.close_interval(0 if round_ else None))
            continue
        ingest.write(batch_of(history.open))  # an open interval, and one behind an interval that may be being closed
        ingest.mark(mark_of(history))
        write()
        ingest.write(batch_of(history.open))
        ingest.publish()
        history.reachable |= {write.seq for write in history.open}
    for seq in sorted(history.reachable):
        resolution = store.at_seq(seq)
        for volume, info in enumerate(volumes):
            start, end = sorted(random.integers(0, info.size_bytes + 2_000, 2).tolist())
            view = PointInTimeView(store, resolution, volume)
            for a, b in ((0, info.size_bytes), (start, end), (start, start + 1)):
                assert list(view.data_ranges(a, b)) == naive(store, resolution, volume, a, b)
        assert list(PointInTimeView(store, resolution, 0).data_ranges()) == naive(store, resolution, 0, 0, 1 << 40)
    store.close()
    ingest.close()
