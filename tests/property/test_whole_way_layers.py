"""From a write to an image, with layers that stop anywhere: what a rung offers is exact, else it is the one before.

Random loads, block sizes, rungs; transfers of layers are put off at a random frame, cut, and go on, or never do.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from pitfs.journal.reader import BlockSource, Interval
from pitfs.model.ladder import LAST_LAYER, NO_LAYER, RUNGS_NS
from pitfs.model.transfer import End
from pitfs.replication.interval import diff_frames, layers_frames, pick_layers, prepare
from pitfs.replication.manifests import diff_manifest, layers_manifest
from pitfs.splitter.startup import journal_directory
from pitfs.store.ingest import Ingest
from pitfs.store.store import Store
from tests.helpers.pipeline import Pipeline
from tests.helpers.stores import feed, read_image
from tests.property.test_whole_way import LAYOUTS

TICKS_NS = (40_000, 700_000, 9_000_000, 130_000_000, 1_700_000_000)  # between writes: other rungs matter with each


@pytest.fixture(autouse=True)
def disk_that_needs_no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here loses power."""
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd: None)


class Sent:
    """An interval whose diff is on the replica, and how far its layers are."""

    def __init__(self, pipeline: Pipeline, interval: Interval) -> None:
        self.pipeline, self.interval = pipeline, interval
        source = BlockSource(journal_directory(pipeline.state), interval, pipeline.block_sizes)
        self.prepared = prepare(interval, pipeline.volumes, source, True)
        self.layer, self.base_bytes = NO_LAYER, 0
        resume = pipeline.ingest.begin(diff_manifest(self.prepared, "waits"))
        for frame in diff_frames(self.prepared, resume):
            feed(pipeline.ingest, frame)

    def send(self, layer: int) -> None:
        """Up to that layer, unless it is cut or put off on the way."""
        pipeline, random = self.pipeline, self.pipeline.random
        if layer <= self.layer or self.prepared.journal is None:
            return
        picked = pick_layers(self.prepared, self.layer, layer, self.base_bytes)
        manifest = layers_manifest(picked, "some")
        resume, payload_bytes = pipeline.ingest.begin(manifest), int(random.choice([4096, 1 << 20]))
        for frame in layers_frames(picked, resume, payload_bytes):
            if random.random() < 0.1:
                if random.random() < 0.5:
                    pipeline.ingest.park(())
                else:
                    pipeline.ingest.close()
                    pipeline.ingest = Ingest(str(pipeline.tmp), pipeline.hello)
                return
            feed(pipeline.ingest, frame)
            if isinstance(frame, End):
                self.layer, self.base_bytes = layer, self.base_bytes + frame.lengths[-1]

    def reachable(self) -> set[int]:
        """By the plain definition: the last write of each granule that ends within the interval."""
        interval = self.interval
        ends = {interval.from_seq, interval.to_seq}
        if self.layer == NO_LAYER:
            return ends
        rung_ns = RUNGS_NS[self.layer]
        seqs = range(interval.from_seq + 1, interval.to_seq + 1)
        if rung_ns == 0:
            return ends | set(seqs)
        last = {time_ns // rung_ns: seq for seq, time_ns in zip(seqs, interval.times.tolist(), strict=True)}
        return ends | {seq for granule, seq in last.items() if granule < interval.to_time_ns // rung_ns}


def check(pipeline: Pipeline, sent: list[Sent]) -> None:
    """Every seq and every time, and those between, lead to the newest reachable state, exact."""
    reachable = sorted(set().union(*(each.reachable() for each in sent)))
    times = np.concatenate([each.interval.times for each in sent])
    store = Store.open(str(pipeline.tmp / "g"))
    try:
        for seq in range(reachable[0], reachable[-1] + 1):
            wanted = max(each for each in reachable if each <= seq)
            found = store.at_seq(seq)
            assert found.seq == wanted
            if seq == wanted or seq % 7 == 0:
                for volume in range(len(pipeline.sizes)):
                    assert read_image(store, found, volume) == pipeline.states[wanted][volume], (seq, volume)
        for seq, time_ns in enumerate(times.tolist(), reachable[0] + 1):
            wanted = max(each for each in reachable if each <= seq)
            resolution, exact = store.at_time(time_ns)
            assert (resolution.seq, exact) == (wanted, wanted == seq), "strict lets the one before through"
            before, _ = store.at_time(time_ns - 1)
            assert before.seq == max(each for each in reachable if each <= seq - 1)
    finally:
        store.close()


@pytest.mark.parametrize("seed", range(16))
def test_what_a_rung_offers_is_exact_and_all_else_is_the_one_before(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    layout = LAYOUTS[seed % len(LAYOUTS)]
    pipeline = Pipeline(tmp_path, *layout, seed=seed, tick_ns=int(random.choice(TICKS_NS)))
    pipeline.ship()
    sent: list[Sent] = []
    for _ in range(4):
        for _ in range(int(random.integers(1, 30))):
            pipeline.random_write()
        pipeline.splitter.mark()
        for item in pipeline.items():
            assert isinstance(item, Interval)
            sent.append(Sent(pipeline, item))
        for _ in range(3):
            sent[int(random.integers(len(sent)))].send(int(random.integers(LAST_LAYER + 1)))
        check(pipeline, sent)
    for each in sent:
        while each.prepared.journal is not None and each.layer != LAST_LAYER:
            each.send(LAST_LAYER)
    check(pipeline, sent)
    for each in sent:
        each.prepared.source.close()
    pipeline.close()
