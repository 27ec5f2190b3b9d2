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

from pitfs.cli.main import main
from pitfs.model.ladder import RUNGS_NS
from pitfs.model.transfer import VolumeInfo
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.ingest import Ingest
from pitfs.store.objects.format import CATALOG
from pitfs.store.pins.pins import Pins
from pitfs.store.retention import pruner as pruner_module
from pitfs.store.retention import thinning
from pitfs.store.retention.levels import Action, Remove, Thin
from pitfs.store.retention.pruner import Pruner
from pitfs.store.store import Store
from tests.helpers.histories import unsynced
from tests.helpers.retention import Model, allocated_bytes, assert_tidy, instants_of, model_of
from tests.helpers.stores import ingest_transfer
from tests.helpers.transfers import History, Write

CAUSE = "retention: a test"


@pytest.fixture(autouse=True)
def disk_that_needs_no_sync(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing here loses power."""
    monkeypatch.setattr(pruner_module, "sync_file_system", lambda path: None)
    with unsynced():
        yield


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


def removes(model: Model, random: np.random.Generator) -> list[list[Action]]:
    """Of some snapshots; the last one stays. Some at once, some step by step behind the same one."""
    store = Store.open(model.path)
    ids = [snapshot.id for snapshot in store.snapshots()]
    store.close()
    kept = [0] + [each for each in ids[:-1] if random.random() < 0.5] + ids[-1:]
    groups: list[list[Action]] = []
    for after, before in itertools.pairwise(kept):
        between = [each for each in ids if after < each < before]
        steps = [each for each in between[1:] if random.random() < 0.3]
        groups += [[Remove(after or None, each, CAUSE) for each in (*steps, before)]] if between else []
    return groups


def actions_for(model: Model, random: np.random.Generator) -> list[list[Action]]:
    """Some of both, in any order; what is removed isn't thinned before."""
    groups = removes(model, random)
    gone = [((each.after_id or 0), each.before_id) for (*_, each) in groups if isinstance(each, Remove)]
    groups += [
        [each] for each in thinnings(model, random)
        if isinstance(each, Thin) and not any(a < each.end_snapshot_id <= b for a, b in gone)
    ]  # fmt: skip
    return [groups[number] for number in random.permutation(len(groups)).tolist()]


@pytest.mark.parametrize("seed", range(40, 52))
def test_what_actions_and_pins_keep_is_there_and_nothing_else(tmp_path: Path, seed: int) -> None:
    model = model_of(tmp_path, seed, count=9)
    random = np.random.default_rng(seed)
    for number in range(3):
        groups = actions_for(model, random)
        actions = list(itertools.chain(*groups))
        with Pruner(model.path) as pruner, Pins(model.path, "a test") as pins:
            pinned = random.choice(sorted(model.instants), number).tolist()
            for seq in pinned:
                pins.pin(seq, model.history.times_ns[seq])
            foretold = sum(pruner.foretell(group[-1]) for group in groups)
            before, count = allocated_bytes(model.path), model.take(actions, pinned)
            progress = pruner.apply(actions)
        assert (progress.done, progress.skipped) == (count, len(actions) - count)
        assert progress.freed_bytes == before - allocated_bytes(model.path)
        if count == len(actions):
            assert progress.freed_bytes == pytest.approx(foretold, rel=0.01, abs=4 * 4096)  # small stores, odd blocks
        model.check()
        assert_tidy(model.path)
        ingest = Ingest(str(model.root), model.history.hello)
        model.receive(ingest, 2)
        ingest.close()
    model.check()


@pytest.mark.parametrize("seed", [1, 3, 7, 10])
def test_what_is_left_is_found_whole_and_its_catalog_can_be_made_again(tmp_path: Path, seed: int) -> None:
    model, random = model_of(tmp_path, seed, count=9), np.random.default_rng(seed)
    for _ in range(2):
        actions = list(itertools.chain(*actions_for(model, random)))
        with Pruner(model.path) as pruner:
            model.take(actions)
            pruner.apply(actions)
    assert main(["check", model.path, "--data"]) == 0
    os.unlink(os.path.join(model.path, CATALOG))
    assert main(["check", model.path, "--rebuild"]) == 0
    with Pruner(model.path):
        pass
    model.check()
    assert_tidy(model.path)


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
    before, actions = set(model.instants), list(itertools.chain(*actions_for(model, random)))
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
            stack.enter_context(Pruner(model.path)).apply(actions)
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


# How much room is left


class Writer(History):
    """Of volumes too large to keep all states."""

    def _keep_state(self) -> None:
        self.states.append([])

    def again(self, write: Write) -> None:
        """As another one did it."""
        for number, content in enumerate(write.contents):
            self._put(write.volume, write.block + number, content)
        self.times_ns.append(write.time_ns)
        self.open.append(write)


@pytest.mark.parametrize("seed", range(3))
def test_a_pruned_store_takes_as_much_as_one_that_only_received_what_is_left(tmp_path: Path, seed: int) -> None:
    """Within 2 %: shipped at the granularities that are left, in the intervals that are left."""
    random = np.random.default_rng(seed)
    volumes = (VolumeInfo("a", 800 * 4096, 4096), VolumeInfo("b", 30 * 16384, 16384))
    one, other = (Writer(seed, volumes, step_ns=60_000_000) for _ in range(2))
    pruned, fresh = Ingest(str(tmp_path / "pruned"), one.hello), Ingest(str(tmp_path / "fresh"), other.hello)
    ingest_transfer(pruned, one.close_interval())
    ingest_transfer(fresh, other.close_interval())
    actions: list[Action] = []
    after_id, rungs_ns = 1, (1_000_000_000, 100_000_000)
    for number in range(2, 14):
        for write in [one.write() for _ in range(60)]:
            other.again(write)
        ingest_transfer(pruned, one.close_interval(before_ns=rungs_ns))
        if number < 13 and random.random() < 0.4:
            continue
        granularity_ns = (0, 10_000_000, *rungs_ns, None)[int(random.integers(5))]
        if after_id < number - 1:
            actions.append(Remove(after_id, number, CAUSE))
            granularity_ns = None
        elif granularity_ns != 0:
            actions.append(Thin(number, granularity_ns, CAUSE))
        after_id = number
        before_ns = rungs_ns if granularity_ns == 0 else ()
        ingest_transfer(fresh, other.close_interval(granularity_ns, before_ns=before_ns))
    pruned.close()
    fresh.close()
    assert len(actions) > 3
    before = allocated_bytes(pruned.path)
    with Pruner(pruned.path) as pruner:
        pruner.apply(actions)
    taken = allocated_bytes(pruned.path)
    assert taken < 0.9 * before
    assert taken == pytest.approx(allocated_bytes(fresh.path), rel=0.02)
    stores = Store.open(pruned.path), Store.open(fresh.path)
    assert instants_of(stores[0]) == instants_of(stores[1])
    for store in stores:
        store.close()
