"""What retention leaves of a history: exactly what its actions keep, byte for byte, wherever it was interrupted."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pitfs.model.ladder import RUNGS_NS
from pitfs.model.retention import Action, Remove, Thin
from pitfs.store.catalog import database
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.ingest import Ingest
from pitfs.store.retention import pruner as pruner_module
from pitfs.store.retention import thinning
from pitfs.store.retention.pruner import Pruner
from pitfs.store.store import Store
from tests.helpers.retention import Model, allocated_bytes, assert_tidy, instants_of, model_of

CAUSE = "retention: a test"


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
            actions.append(Thin(interval.end_snapshot_id, granularity_ns, CAUSE))
    store.close()
    return actions


def removes(model: Model, random: np.random.Generator) -> list[Action]:
    """Of some snapshots; the last one stays."""
    store = Store.open(model.path)
    ids = [snapshot.id for snapshot in store.snapshots()]
    store.close()
    kept = [each for each in ids[:-1] if random.random() < 0.5] + ids[-1:]
    actions: list[Action] = [Remove(None, kept[0], CAUSE)] if kept[0] != ids[0] else []
    neighbours = itertools.pairwise(kept)
    return actions + [Remove(a, b, CAUSE) for a, b in neighbours if ids.index(b) - ids.index(a) > 1]


def actions_for(model: Model, random: np.random.Generator) -> list[Action]:
    """Some of both, in any order; what is removed isn't thinned before."""
    found = removes(model, random)
    gone = [((each.after_id or 0), each.before_id) for each in found if isinstance(each, Remove)]
    found += [
        each for each in thinnings(model, random)
        if isinstance(each, Thin) and not any(a < each.end_snapshot_id <= b for a, b in gone)
    ]  # fmt: skip
    return [found[number] for number in random.permutation(len(found)).tolist()]


@pytest.mark.parametrize("seed", range(40, 52))
def test_what_actions_keep_is_there_and_nothing_else(tmp_path: Path, seed: int) -> None:
    model = model_of(tmp_path, seed, count=9)
    random = np.random.default_rng(seed)
    for _ in range(3):
        actions = actions_for(model, random)
        with Pruner(model.path) as pruner:
            foretold = sum(map(pruner.foretell, actions))
            before = allocated_bytes(model.path)
            model.take(actions)
            progress = pruner.apply(actions)
        assert (progress.done, progress.skipped) == (len(actions), 0)
        assert progress.freed_bytes == before - allocated_bytes(model.path)
        assert progress.freed_bytes == pytest.approx(foretold, rel=0.01)
        model.check()
        assert_tidy(model.path)
        ingest = Ingest(str(model.root), model.history.hello)
        model.receive(ingest, 2)
        ingest.close()
    model.check()


@pytest.mark.parametrize("seed", range(8))
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


# Cut off anywhere


class Killed(BaseException):
    """The process is dead: nothing of it runs after this."""


@contextmanager
def killed_at(monkeypatch: pytest.MonkeyPatch, number: int) -> Iterator[list[str]]:
    """Call `number` (from 0) of those that change the disk raises, and all after it."""
    seen: list[str] = []

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            seen.append(name)
            if len(seen) > number >= 0:
                raise Killed
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("pwrite", "rename", "unlink", "open", "ftruncate"):
            patch.setattr(os, name, wrap(name, getattr(os, name)))
        for name in ("put", "delete"):
            patch.setattr(Catalog, name, wrap(name, getattr(Catalog, name)))
        patch.setattr(thinning, "punch", wrap("punch", thinning.punch))
        yield seen


def finish(model: Model, actions: Sequence[Action], random: np.random.Generator) -> None:
    """Opens the store again as a receiver does, or not, and prunes what is left to prune."""
    if random.random() < 0.5:
        Ingest(str(model.root), model.history.hello).close()
    with Pruner(model.path) as pruner:
        pruner.apply(actions)


@pytest.mark.parametrize("seed", range(100, 106))
def test_killed_at_any_step_no_kept_instant_and_no_room_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    model, random = model_of(tmp_path / "whole", seed), np.random.default_rng(seed)
    before, actions = set(model.instants), actions_for(model, random)
    shutil.copytree(tmp_path / "whole", tmp_path / "before")
    with killed_at(monkeypatch, -1) as calls, Pruner(model.path) as pruner:
        model.take(actions)
        pruner.apply(actions)
    model.check()
    taken, kept, root = allocated_bytes(model.path), set(model.instants), model.root
    for number in sorted({*random.integers(0, len(calls), 12).tolist(), len(calls) - 1}):
        model.root = tmp_path / f"killed-{number}"
        model.path = str(model.root / model.history.group)
        shutil.copytree(tmp_path / "before", model.root)
        with ExitStack() as stack, killed_at(monkeypatch, number), suppress(Killed):
            pruner = Pruner(model.path)
            stack.callback(pruner.close)
            pruner.apply(actions)
        store = Store.open(model.path)
        now = instants_of(store)
        assert kept <= now <= before
        for seq in sorted(now):
            model.check_image(store, seq)
        store.close()
        finish(model, actions, random)
        model.check(images=False)
        assert_tidy(model.path)
        assert allocated_bytes(model.path) == taken
        shutil.rmtree(model.root)
    model.root, model.path = root, str(root / model.history.group)
