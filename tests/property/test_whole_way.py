"""From a write to an image of any instant, without processes: byte for byte what the naive model has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pitfs.journal.reader import Copy
from pitfs.replication import full_sync
from pitfs.replication.manifests import copy_manifest
from pitfs.store.store import Store
from tests.helpers.pipeline import Pipeline
from tests.helpers.stores import feed, read_image

LAYOUTS = [
    ([100_000], [4096]),
    ([40_001, 70_000], [512, 4096]),
    ([300_000, 5_000, 66_000], [65536, 512, 1024]),
    ([4096], [4096]),
    ([511], [512]),
]


def check_every_seq(pipeline: Pipeline, sequences: range) -> None:
    store = Store.open(str(pipeline.tmp / "g"))
    try:
        for seq in sequences:
            resolution = store.at_seq(seq)
            assert resolution.seq == seq
            for volume in range(len(pipeline.sizes)):
                assert read_image(store, resolution, volume) == pipeline.states[seq][volume], (seq, volume)
    finally:
        store.close()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_seq_is_exactly_the_model(
    tmp_path: Path, layout: tuple[list[int], list[int]], seed: int
) -> None:
    pipeline = Pipeline(tmp_path, *layout, seed=seed)
    marks = 0
    for _ in range(int(pipeline.random.integers(1, 60))):
        pipeline.random_write()
        while pipeline.random.random() < 0.15:  # intervals without a write among them
            pipeline.splitter.mark()
            marks += 1
    pipeline.splitter.mark()
    assert len(pipeline.ship()) == marks + 1
    check_every_seq(pipeline, range(len(pipeline.states)))
    pipeline.close()


@pytest.mark.parametrize("seed", range(20))
def test_the_first_copy_is_the_state_at_ready_however_writes_race_with_it(tmp_path: Path, seed: int) -> None:
    pipeline = Pipeline(tmp_path, [400_000, 90_001], [4096, 512], seed=seed)
    copy = next(pipeline.items())
    assert isinstance(copy, Copy)
    resume = pipeline.ingest.begin(
        copy_manifest(copy, pipeline.hello.history, pipeline.ingest.welcome())
    )
    read, full_sync._read = full_sync._read, _writing_around(pipeline, full_sync._read)  # type: ignore[assignment]
    limit, full_sync.STRETCH_BYTES = full_sync.STRETCH_BYTES, 16384  # type: ignore[misc]
    try:
        for frame in pipeline.copy_frames(copy, resume):
            feed(pipeline.ingest, frame)
    finally:
        full_sync._read, full_sync.STRETCH_BYTES = read, limit  # type: ignore[misc]
    pipeline.splitter.state.copy = None
    pipeline.random_write()
    pipeline.splitter.mark()
    pipeline.ship()
    check_every_seq(pipeline, range(len(pipeline.states)))
    pipeline.close()


def _writing_around(pipeline: Pipeline, read):  # type: ignore[no-untyped-def]
    """Writes before and after each read of the backing volume: the copy must not see them."""

    def reading(*arguments):  # type: ignore[no-untyped-def]
        for _ in range(int(pipeline.random.integers(3))):
            pipeline.random_write()
        buffer = read(*arguments)
        for _ in range(int(pipeline.random.integers(3))):
            pipeline.random_write()
        return buffer

    return reading


@pytest.mark.parametrize("seed", range(10))
def test_after_a_kill_everything_goes_on(tmp_path: Path, seed: int) -> None:
    pipeline = Pipeline(tmp_path, [200_000, 33_333], [4096, 512], seed=seed)
    random = np.random.default_rng(seed)
    for _ in range(4):
        for _ in range(int(random.integers(1, 20))):
            pipeline.random_write()
        if random.random() < 0.5:
            pipeline.splitter.mark()
        if random.random() < 0.5:
            pipeline.ship()
        # The journal had the write and the backing volume didn't: redo must bring it.
        volume = pipeline.splitter.volumes[0]
        before = pipeline.backings[0].read_bytes()
        pipeline.write(0, 1000, random.bytes(9000))
        with open(pipeline.backings[0], "r+b") as file:
            file.write(before)
        assert volume.path
        pipeline.crash()
        pipeline.start()
        assert [path.read_bytes() for path in pipeline.backings] == pipeline.states[-1]
        assert pipeline.splitter.state.seq == len(pipeline.states) - 1
    pipeline.splitter.mark()
    pipeline.ship()
    check_every_seq(pipeline, range(len(pipeline.states)))
    pipeline.close()


@pytest.mark.parametrize("seed", range(4))
def test_with_less_room_granularity_falls_no_further_than_needed(tmp_path: Path, seed: int) -> None:
    counts, rungs = [], []
    for rate in (None, 450_000, 400_000, 350_000, 300_000, 250_000, 200_000, 150_000, 1):
        pipeline = Pipeline(tmp_path / str(rate), [100_000], [4096], seed=seed, tick_ns=5_000_000)
        for _ in range(80):
            pipeline.random_write()
        pipeline.splitter.mark()
        (manifest,) = pipeline.ship(rate_bytes_per_s=rate)
        store = Store.open(str(pipeline.tmp / "g"))
        reached = set()
        for seq in range(len(pipeline.states)):
            resolution = store.at_seq(seq)
            assert resolution.seq <= seq
            assert read_image(store, resolution, 0) == pipeline.states[resolution.seq][0]
            reached.add(resolution.seq)
        assert len(reached) == {0: 81, None: 2}.get(manifest.granularity_ns, manifest.position_count + 2)
        counts.append(len(reached))
        rungs.append(manifest.granularity_ns)
        store.close()
        pipeline.close()
    assert rungs[0] == 0 and rungs[-1] is None
    assert counts == sorted(counts, reverse=True) and len(set(counts)) > 3, (rungs, counts)


def test_without_room_for_it_the_difference_journal_is_erased(tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path, [100_000], [4096], seed=1)
    for _ in range(20):
        pipeline.random_write()
    pipeline.splitter.mark()
    (manifest,) = pipeline.ship(rate_bytes_per_s=1.0)
    assert manifest.granularity_ns is None and "doesn't fit" in manifest.cause
    store = Store.open(str(tmp_path / "g"))
    assert store.at_seq(7).seq == 0
    assert read_image(store, store.at_seq(20), 0) == pipeline.states[20][0]
    store.close()
    pipeline.close()
