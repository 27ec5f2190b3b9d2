"""Pruning beside others: readers, a receiver, another pruner, a full disk."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pitfs.errors import NoSuchInstantError, PitfsError, PositionMismatchError, StoreError
from pitfs.model.transfer import VolumeInfo
from pitfs.store import opening
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.ingest import Ingest
from pitfs.store.objects.format import CATALOG, LOCK, RESERVE
from pitfs.store.pins import pin_file
from pitfs.store.pins.pins import Pins
from pitfs.store.retention import pruner as pruner_module
from pitfs.store.retention.levels import Action, Policy, Remove, Thin, parse_steps
from pitfs.store.retention.policy import load_policy, save_policy
from pitfs.store.retention.pruner import Pruner
from pitfs.store.store import Store
from tests.helpers.histories import unsynced
from tests.helpers.loops import LoopDevice, MountedFilesystem, fill, free_file
from tests.helpers.processes import run
from tests.helpers.retention import Model, allocated_bytes, assert_tidy, model_of
from tests.helpers.stores import feed, ingest_transfer, object_files
from tests.helpers.transfers import History

CAUSE = "retention: a test"


@pytest.fixture(autouse=True)
def disk_that_needs_no_sync(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing here loses power."""
    monkeypatch.setattr(pruner_module, "sync_file_system", lambda path: None)
    with unsynced():
        yield


def thin_all(path: str, granularity_ns: int | None = None) -> list[Thin]:
    """Every journal is brought to that rung."""
    store = Store.open(path)
    try:
        return [
            Thin(each.end_snapshot_id, granularity_ns, CAUSE)
            for each in store.intervals() if each.granularity_ns is not None
        ]  # fmt: skip
    finally:
        store.close()


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return model_of(tmp_path, 4, count=8)


# Readers


def test_a_pinned_instant_keeps_its_interval_and_its_image(model: Model) -> None:
    store = Store.open(model.path)
    inner = sorted(seq for seq in model.instants if store.at_seq(seq).kind == "intermediary")
    seq = inner[len(inner) // 2]
    actions = thin_all(model.path)
    with Pins(model.path, "a test") as pins:
        found = pins.pinned(store, store.at_seq(seq))
        kept = next(action for action in actions if action.end_snapshot_id == found.end_snapshot_id)
        with Pruner(model.path) as pruner:
            progress = pruner.apply(actions)
            assert (progress.done, progress.skipped) == (len(actions) - 1, 1)
        model.take([action for action in actions if action is not kept])
        model.check()
        model.check_image(store, seq)
    with Pruner(model.path) as pruner:
        assert pruner.apply(actions).done == 1
    model.take([kept])
    model.check()
    with pytest.raises(NoSuchInstantError, match="pruned"), Pins(model.path, "late") as pins:
        pins.pinned(store, found)
    store.close()


def test_a_pin_of_a_snapshot_keeps_no_journal_and_pins_without_number_keep_all(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    actions, store = thin_all(model.path), Store.open(model.path)
    monkeypatch.setattr(pin_file, "ENTRIES", 0)
    with Pins(model.path, "many") as pins:
        pins.pin(*_position(store, min(model.instants)))
        pins.pin(*_position(store, max(model.instants)))
        with Pruner(model.path) as pruner:
            assert pruner.apply(actions).skipped == len(actions)
    monkeypatch.undo()
    model.check(images=False)
    with Pins(model.path, "snapshots") as pins:
        for snapshot in store.snapshots():
            pins.pin(snapshot.seq, snapshot.time_ns)
        with Pruner(model.path) as pruner:
            assert pruner.apply(actions).skipped == 0
    model.take(actions)
    model.check()
    store.close()


@pytest.mark.parametrize("kind", ["thin", "remove"])
def test_a_pin_that_comes_before_the_commit_is_in_time(
    model: Model, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    store = Store.open(model.path)
    first, *_, last = store.snapshots()
    action: Action = Remove(first.id, last.id, CAUSE) if kind == "remove" else thin_all(model.path)[0]
    seq = min(seq for seq in model.instants if store.at_seq(seq).kind == "intermediary")
    before = allocated_bytes(model.path)
    with Pins(model.path, "late") as pins, Pruner(model.path) as pruner:
        commit = pruner._commit
        monkeypatch.setattr(
            pruner, "_commit", lambda steps: pins.pinned(store, store.at_seq(seq)) and commit(steps)
        )  # fmt: skip
        progress = pruner.apply([action])
        assert (progress.done, progress.skipped, progress.freed_bytes) == (0, 1, 0)
        model.check()
    assert allocated_bytes(model.path) == before
    assert_tidy(model.path)
    store.close()


def _position(store: Store, seq: int) -> tuple[int, int]:
    found = store.at_seq(seq)
    return found.seq, found.time_ns


def test_a_reader_that_has_the_store_open_finds_what_is_left(tmp_path: Path) -> None:
    """Asked for any time while it is pruned, it gives a state that there was, whole."""
    model = model_of(tmp_path, 11, count=14)
    actions, rounds = [thin_all(model.path, 1_000_000), thin_all(model.path, 100_000_000), thin_all(model.path)], 0
    store, is_done, errors = Store.open(model.path), threading.Event(), list[BaseException]()

    def read() -> None:
        nonlocal rounds
        random = np.random.default_rng(1)
        with Pins(model.path, "reader") as pins:
            while not is_done.is_set() or rounds < 20:
                rounds += 1
                try:
                    found = pins.pinned(store, store.at_seq(int(random.integers(1, max(model.instants)))))
                    model.check_image(store, found.seq)
                    pins.unpin(found.seq)
                except NoSuchInstantError:
                    pass
                except BaseException as error:
                    errors.append(error)
                    return

    thread = threading.Thread(target=read)
    thread.start()
    for each in actions:
        with Pruner(model.path) as pruner:
            pruner.apply(each)
    is_done.set()
    thread.join()
    assert errors == [] and rounds >= 20
    store.close()
    with Pruner(model.path) as pruner:
        pruner.apply(thin_all(model.path))
    assert object_files(model.path, "journal-*") == []


# The receiver


def shipped(tmp_path: Path) -> tuple[Ingest, History]:
    """A receiver with an interval without journal, whose layers are yet to come."""
    history = History(5, (VolumeInfo("a", 90_000, 4096),), step_ns=400_000_000)
    ingest = Ingest(str(tmp_path), history.hello)
    ingest_transfer(ingest, history.close_interval())
    for _ in range(30):
        history.write()
    return ingest, history


@pytest.mark.parametrize("granularity_ns", [None, 10_000_000_000, 1_000_000_000])
@pytest.mark.parametrize("when", ["before", "staged"])
def test_layers_of_an_interval_that_was_pruned_are_refused(
    tmp_path: Path, granularity_ns: int | None, when: str
) -> None:
    ingest, history = shipped(tmp_path)
    transfer = history.close_interval(before_ns=(500_000_000,))
    coarse, *_, finest = transfer.layers
    assert finest is not coarse
    transfer.layers = [coarse]
    ingest_transfer(ingest, transfer)
    if when == "staged":
        frames = list(finest.frames(np.random.default_rng(0)))
        for frame in frames[:-1]:
            feed(ingest, frame)
    (action,) = thin_all(ingest.path, granularity_ns)
    with Pruner(ingest.path) as pruner:
        assert pruner.apply([action]).done == 1
    assert ingest.welcome().coarse == ()
    with pytest.raises(PositionMismatchError, match=r"was pruned.*retention: a test"):
        ingest.end(finest.end) if when == "staged" else ingest.begin(finest.manifest)
    assert os.listdir(os.path.join(ingest.path, "staging")) == []
    store = Store.open(ingest.path)
    (interval,) = store.intervals()
    assert interval.granularity_ns in (granularity_ns, None) and interval.cause == CAUSE
    store.close()
    for _ in range(3):
        history.write()
    ingest_transfer(ingest, history.close_interval())
    ingest.close()
    Ingest(str(tmp_path), history.hello).close()
    assert_tidy(ingest.path)


def test_layers_of_an_interval_that_was_removed_are_refused(tmp_path: Path) -> None:
    ingest, history = shipped(tmp_path)
    transfer = history.close_interval()
    layers, transfer.layers = transfer.layers[0], []
    ingest_transfer(ingest, transfer)
    for _ in range(5):
        history.write()
    ingest_transfer(ingest, history.close_interval())
    for frame in list(layers.frames(np.random.default_rng(0)))[:-1]:
        feed(ingest, frame)
    with Pruner(ingest.path) as pruner:
        assert pruner.apply([Remove(1, 3, CAUSE)]).done == 1
    assert ingest.welcome().coarse == ()
    with pytest.raises(PositionMismatchError, match="which the store doesn't have"):
        ingest.end(layers.end)
    assert os.listdir(os.path.join(ingest.path, "staging")) == []
    ingest.close()
    Ingest(str(tmp_path), history.hello).close()
    assert_tidy(ingest.path)


def test_an_interval_that_waits_for_its_layers_stops_waiting(tmp_path: Path) -> None:
    """It is as coarse as it is to be: its cause changes, and nothing else."""
    ingest, history = shipped(tmp_path)
    transfer = history.close_interval()
    layers, transfer.layers = transfer.layers, []
    ingest_transfer(ingest, transfer)
    assert len(ingest.welcome().coarse) == 1
    before = allocated_bytes(ingest.path)
    store = Store.open(ingest.path)
    (interval,) = store.intervals()
    with Pruner(ingest.path) as pruner:
        action = Thin(interval.end_snapshot_id, 1_000_000_000, CAUSE)
        assert pruner.foretell(action) == 0
        assert pruner.apply([action, action]).done == 1
    assert allocated_bytes(ingest.path) == before and ingest.welcome().coarse == ()
    with pytest.raises(PositionMismatchError, match="was pruned"):
        ingest.begin(layers[0].manifest)
    store.close()
    ingest.close()


def test_layers_that_came_after_the_look_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ingest, history = shipped(tmp_path)
    transfer = history.close_interval(before_ns=(500_000_000,))
    coarse, *_, finest = transfer.layers
    transfer.layers = [coarse]
    ingest_transfer(ingest, transfer)
    (action,) = thin_all(ingest.path, 10_000_000_000)
    finer = [finest]
    monkeypatch.setattr(
        pruner_module, "sync_file_system", lambda path: finer and ingest_transfer(ingest, finer.pop())
    )  # fmt: skip
    with Pruner(ingest.path) as pruner:
        progress = pruner.apply([action])
        assert (progress.done, progress.skipped, progress.freed_bytes) == (0, 1, 0)
    store = Store.open(ingest.path)
    (interval,) = store.intervals()
    assert interval.granularity_ns == 0
    store.close()
    ingest.close()
    assert_tidy(ingest.path)


def test_a_receiver_goes_on_while_the_store_is_pruned(tmp_path: Path) -> None:
    """In another thread, with a catalog of its own: what streams in and is closed meanwhile is all there."""
    model = model_of(tmp_path, 12, count=6)
    ingest, is_done, errors = Ingest(str(model.root), model.history.hello), threading.Event(), list[object]()

    def prune() -> None:
        try:
            while not is_done.is_set():
                with Pruner(model.path) as pruner:
                    pruner.apply(thin_all(model.path, 100_000_000)[:-2])  # the last ones may still get layers
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=prune)
    thread.start()
    for _ in range(6):
        model.receive(ingest, 2)
        ingest.flush(model.history.protected_ns)
    is_done.set()
    thread.join()
    ingest.close()
    assert errors == []
    actions = thin_all(model.path)
    with Pruner(model.path) as pruner:
        pruner.apply(actions)
    model.instants = set(model.history.reachable)
    model.take(actions)
    store = Store.open(model.path)
    kept = {snapshot.seq for snapshot in store.snapshots()}
    store.close()
    model.instants = kept
    model.check()
    assert_tidy(model.path)


def test_a_damaged_journal_stays_and_does_not_keep_the_others(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    actions = thin_all(model.path, 1_000_000)
    index = object_files(model.path, "journal-*.index")[1]
    data = bytearray(index.read_bytes())
    data[4100] ^= 1
    index.write_bytes(data)
    with Pruner(model.path) as pruner:
        progress = pruner.apply(actions)
    assert progress.skipped >= 1 and progress.done == len(actions) - progress.skipped
    assert "not pruned" in caplog.text and index.exists()
    assert_tidy(model.path)


def test_a_lost_object_does_not_keep_the_others(model: Model) -> None:
    actions = thin_all(model.path, 1_000_000)
    gone = [*object_files(model.path, "journal-*.index")[:1], *object_files(model.path, "journal-*.blocks")[-1:]]
    for path in gone:
        path.unlink()
    for change in (actions, thin_all(model.path)):
        with Pruner(model.path) as pruner:
            assert sum(map(pruner.foretell, change)) >= 0
            assert pruner.apply(change).done >= len(change) - 1
    assert_tidy(model.path)


# Who else is there


def test_a_second_pruner_is_told_so_and_one_that_only_foretells_is_not(model: Model) -> None:
    with Pruner(model.path):
        with pytest.raises(StoreError, match="another process is pruning"):
            Pruner(model.path)
        with Pruner(model.path, changes=False) as pruner:
            assert sum(map(pruner.foretell, thin_all(model.path))) > 0
    with Pruner(model.path):
        pass


def test_a_store_that_an_older_pitfs_writes_is_left_alone(model: Model) -> None:
    ingest = Ingest(str(model.root), model.history.hello)
    with Pruner(model.path):
        pass
    ingest.close()
    with open(os.path.join(model.path, LOCK), "r+b") as lock:
        lock.truncate()
        lock.write(b"pid 1 on an-older-one\n")
        lock.flush()
        with Pruner(model.path):
            pass
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match=r"an older pitfs.*restart `pitfs receive`"):
            Pruner(model.path)


@pytest.mark.loop
def test_on_a_read_only_file_system_it_says_so_and_foretells(model: Model, tmp_path: Path) -> None:
    place = tmp_path / "read-only"
    place.mkdir()
    run(["mount", "--bind", model.root, place])
    try:
        run(["mount", "-o", "remount,bind,ro", place])
        path = str(place / model.history.group)
        with pytest.raises(StoreError, match="read-only file system: nothing can be pruned"):
            Pruner(path)
        with Pruner(path, changes=False) as pruner:
            assert sum(map(pruner.foretell, thin_all(path))) > 0
    finally:
        run(["umount", place])


# Room


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with LoopDevice(free_file(tmp_path / "disk.img", 100 << 20)) as device:
        run(["mkfs.ext4", "-q", "-m", "0", device])
        with MountedFilesystem(device, tmp_path / "disk", "ext4") as mounted:
            yield mounted


@pytest.mark.loop
@pytest.mark.parametrize("granularity_ns", [None, 10_000_000])
def test_with_no_byte_free_room_comes_back(disk: Path, granularity_ns: int | None) -> None:
    model = model_of(disk, 6, count=8, block_size=65536, writes=30)
    reserve = Path(model.path, RESERVE)
    assert reserve.stat().st_blocks * 512 >= opening.RESERVE_BYTES
    fill(disk / "ballast")
    assert opening.free_bytes(model.path) == 0
    with Pruner(model.path) as pruner:
        assert not reserve.exists()
        actions = thin_all(model.path, granularity_ns)
        foretold, before = sum(map(pruner.foretell, actions)), allocated_bytes(model.path)
        progress = pruner.apply(actions)
    assert progress.freed_bytes == before - allocated_bytes(model.path) > 0
    assert progress.freed_bytes == pytest.approx(foretold, rel=0.01)
    model.take(actions)
    model.check()
    assert_tidy(model.path)
    (disk / "ballast").unlink()
    with Pruner(model.path):
        pass
    assert reserve.stat().st_blocks * 512 >= opening.RESERVE_BYTES


@pytest.mark.loop
def test_with_no_byte_free_a_policy_can_be_set(disk: Path) -> None:
    model = model_of(disk, 6, count=4, block_size=65536, writes=30)
    fill(disk / "ballast")
    assert opening.free_bytes(model.path) == 0
    save_policy(model.path, Policy(parse_steps("snapshots 2h")))
    assert load_policy(model.path) == Policy(parse_steps("snapshots 2h"))


def test_what_the_catalog_does_not_need_any_more_is_given_back_bit_by_bit(model: Model) -> None:
    path = os.path.join(model.path, CATALOG)
    catalog = Catalog(path, "write")
    with catalog.changes():
        for minute in range(200_000):
            catalog.put("minutes", (minute, 1))
    with catalog.changes():
        catalog.rows("DELETE FROM minutes WHERE minute < 200000")
    catalog.close()
    before = os.path.getsize(path)
    with Pruner(model.path) as pruner:
        pruner.apply([])
    assert os.path.getsize(path) < before / 3
    model.check(images=False)


def test_an_unwritable_disk_is_one_error(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> None:
        raise OSError(5, "Input/output error")

    actions = thin_all(model.path)
    with Pruner(model.path) as pruner:
        monkeypatch.setattr(pruner_module, "sync_file_system", fail)
        with pytest.raises(PitfsError, match="pruning: Input/output error"):
            pruner.apply(actions)
    monkeypatch.undo()
    model.check(images=False)
    with Pruner(model.path):
        pass
    assert_tidy(model.path)


def test_a_removal_whose_snapshots_are_gone_is_forgotten(model: Model) -> None:
    """As a rebuilt catalog may have it: what it had to free went with a later one."""
    catalog = Catalog(os.path.join(model.path, CATALOG), "write")
    with catalog.changes():
        catalog.put("removals", (5_000, 4_990))
        catalog.put("removals", (5_001, 5_001))
    catalog.close()
    with Pruner(model.path):
        pass
    model.check()
    assert_tidy(model.path)


def test_who_has_waited_long_for_the_locks_goes_on_all_the_same(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time for which others wait begins when the locks are held: else each turn would end before it began."""
    turns = 0

    @contextmanager
    def slowly(path: str) -> Iterator[None]:
        nonlocal turns
        turns += 1
        assert turns < 50
        time.sleep(0.02)
        yield

    monkeypatch.setattr(pruner_module, "LOCKED_S", 0.01)
    monkeypatch.setattr(pruner_module, "changes_locked", slowly)
    with Pruner(model.path) as pruner:
        assert pruner.apply(thin_all(model.path)).done
