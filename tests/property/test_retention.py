"""What retention leaves of a history: exactly what its actions keep, byte for byte, wherever it was interrupted."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from pitfs.model.ladder import RUNGS_NS
from pitfs.model.retention import Action, Thin
from pitfs.store.catalog import database
from pitfs.store.ingest import Ingest
from pitfs.store.retention import pruner as pruner_module
from pitfs.store.retention.pruner import Pruner
from pitfs.store.store import Store
from tests.helpers.retention import Model, allocated_bytes, assert_tidy, model_of


@pytest.fixture(autouse=True)
def disk_that_needs_no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here loses power."""
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd: None)
    monkeypatch.setattr(database, "DURABLE", "OFF")
    monkeypatch.setattr(database, "NOT_DURABLE", "OFF")
    monkeypatch.setattr(pruner_module, "sync_file_system", lambda path: None)


def thinnings(model: Model, random: np.random.Generator) -> list[Action]:
    """Of some intervals, to some rungs."""
    store = Store.open(model.path)
    actions: list[Action] = []
    for interval in store.intervals():
        rungs_ns = [rung for rung in RUNGS_NS if interval.granularity_ns is not None and rung > interval.granularity_ns]
        if interval.granularity_ns is not None and random.random() < 0.7:
            granularity_ns = ([*rungs_ns, None])[int(random.integers(len(rungs_ns) + 1))]
            actions.append(Thin(interval.end_snapshot_id, granularity_ns, "retention: a test"))
    store.close()
    return actions


@pytest.mark.parametrize("seed", range(20))
def test_thinned_intervals_keep_the_instants_of_their_rung(tmp_path: Path, seed: int) -> None:
    model = model_of(tmp_path, seed)
    model.check(images=False)
    random = np.random.default_rng(seed)
    for _ in range(3):
        actions = thinnings(model, random)
        with Pruner(model.path) as pruner:
            foretold = sum(map(pruner.foretell, actions))
            before = allocated_bytes(model.path)
            model.take(actions)
            progress = pruner.apply(actions)
        assert (progress.done, progress.skipped) == (len(actions), 0)
        assert foretold == progress.freed_bytes == before - allocated_bytes(model.path)
        model.check()
        assert_tidy(model.path)
    ingest = Ingest(str(model.root), model.history.hello)
    model.receive(ingest, 2)
    ingest.close()
    model.check()
