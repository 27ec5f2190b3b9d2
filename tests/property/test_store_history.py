"""What goes in as transfers comes out as images: every reachable state, however the transfers came."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from pitfs.errors import NoSuchInstantError
from pitfs.model.transfer import Begin, Checkpoint, End
from pitfs.store.ingest import Ingest
from pitfs.store.store import Store
from tests.helpers.stores import feed, ingest_transfer, object_files, read_image
from tests.helpers.transfers import START_NS, History, random_history, random_transfers


@pytest.fixture(autouse=True)
def disk_that_needs_no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here loses power: that the syncs are made, and when, is what test_store_faults counts."""
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd: None)


def assert_state(store: Store, history: History, seq: int) -> None:
    resolution = store.at_seq(seq)
    assert (resolution.seq, resolution.time_ns) == (seq, history.times_ns[seq])
    for volume in range(len(history.volumes)):
        assert read_image(store, resolution, volume) == history.states[seq][volume]


@pytest.mark.parametrize("seed", range(12))
def test_every_reachable_state_is_the_volume_as_it_was(tmp_path: Path, seed: int) -> None:
    history = random_history(seed)
    ingest = Ingest(str(tmp_path), history.hello)
    store = None
    for transfer in random_transfers(history, 8):
        welcome = ingest_transfer(ingest, transfer, seed)
        m = transfer.manifest
        assert (welcome.mark, welcome.seq, welcome.time_ns) == (m.mark, m.to_seq, m.to_time_ns)
        store = store or Store.open(ingest.path)  # stays open while more is committed
        assert store.protected_through_ns() == m.protected_through_ns
    assert store is not None
    for seq in sorted(history.reachable):
        assert_state(store, history, seq)
    store.close()
    ingest.close()


def in_open_granule(history: History, time_ns: int) -> bool:
    """Whether writes that the granularity doesn't tell apart may come before that time, and after in its granule."""
    for from_ns, to_ns, granularity_ns in history.granules:
        if from_ns < time_ns < to_ns:
            granule = time_ns // granularity_ns
            times = [t for t in history.times_ns if from_ns < t <= to_ns]
            later = [t for t in times if t > time_ns and t // granularity_ns == granule]
            return time_ns >= times[0] and bool(later or to_ns // granularity_ns == granule)
    return False


@pytest.mark.parametrize("seed", range(20, 32))
def test_each_time_leads_to_the_newest_reachable_state_not_after_it(tmp_path: Path, seed: int) -> None:
    history = random_history(seed, max_block_count=6)
    ingest = Ingest(str(tmp_path), history.hello)
    for transfer in random_transfers(history, 8):
        ingest_transfer(ingest, transfer)
    store = Store.open(ingest.path)
    last_seq, protected_ns = history.at[0], store.protected_through_ns()
    gaps = list(store.gaps())
    interesting = {t + d for t in history.times_ns[: last_seq + 1] for d in (-1, 0, 1)} | {protected_ns}
    for time_ns in sorted(interesting):
        if not START_NS <= time_ns <= protected_ns:
            with pytest.raises(NoSuchInstantError):
                store.at_time(time_ns)
            continue
        written = int(np.searchsorted(history.times_ns[: last_seq + 1], time_ns, "right")) - 1
        wanted = max(seq for seq in history.reachable if seq <= written)
        resolution, exact = store.at_time(time_ns)
        assert (resolution.seq, resolution.time_ns) == (wanted, history.times_ns[wanted])
        assert exact == (
            history.times_ns[wanted] == time_ns
            or (
                wanted == written
                and not any(g.from_time_ns < time_ns < g.to_time_ns for g in gaps)
                and not in_open_granule(history, time_ns)
            )
        )
        assert store.at_instant(time_ns) == (resolution if resolution.time_ns == time_ns else None)
    with pytest.raises(NoSuchInstantError):
        store.at_time(protected_ns + 1)
    with pytest.raises(NoSuchInstantError):
        store.at_seq(last_seq + 1)
    store.close()
    ingest.close()


@pytest.mark.parametrize("seed", range(40, 48))
def test_a_transfer_cut_anywhere_resumes_at_its_last_checkpoint(tmp_path: Path, seed: int) -> None:
    history = random_history(seed)
    random = np.random.default_rng(seed)
    ingest = Ingest(str(tmp_path), history.hello)
    for transfer in (each for made in random_transfers(history, 5) for each in (made, *made.layers)):
        point = None
        done = False
        while not done:
            resumed = ingest.begin(transfer.manifest)
            if point is not None:
                assert resumed == point
            for frame in transfer.frames(random, resumed.lengths, bool(random.integers(2))):
                if isinstance(frame, Begin):
                    continue
                result = feed(ingest, frame)
                if isinstance(frame, Checkpoint):
                    point = result
                    assert point is not None and point.cursor == frame.cursor
                if isinstance(frame, End):
                    done = True
                elif random.random() < 0.05:
                    if random.random() < 0.3:
                        point = ingest.park(tuple(ingest.checkpoint((9,)).lengths))
                    elif random.random() < 0.5:  # the receiver goes down too
                        ingest.close()
                        ingest = Ingest(str(tmp_path), history.hello)
                    break
    store = Store.open(ingest.path)
    for seq in sorted(history.reachable)[::3]:
        assert_state(store, history, seq)
    store.close()
    ingest.close()


@pytest.mark.parametrize("seed", range(50, 56))
def test_each_layer_makes_an_interval_finer_and_an_open_image_stays_right(tmp_path: Path, seed: int) -> None:
    """Layers of several intervals in any order, newest first or not; readers have resolved and go on reading."""
    history = random_history(seed)
    random = np.random.default_rng(seed)
    ingest = Ingest(str(tmp_path), history.hello)
    waiting = []
    for made in random_transfers(history, 6):
        layers, made.layers = made.layers, []
        ingest_transfer(ingest, made)
        waiting.append(layers)
    store = Store.open(ingest.path)
    opened = [store.at_seq(seq) for seq in range(history.at[0] + 1)]
    while any(waiting):
        layers = waiting[int(random.choice([n for n, each in enumerate(waiting) if each]))]
        layer = layers.pop(0)
        ingest_transfer(ingest, layer)
        m = layer.manifest
        interval = next(i for i in store.intervals() if i.to_seq == m.to_seq)
        assert (interval.granularity_ns, interval.cause) == (m.granularity_ns, m.cause)
        opened += [store.at_seq(seq) for seq in range(m.from_seq, m.to_seq + 1)]
        objects = {path.name for path in object_files(ingest.path)}
        assert len([name for name in objects if name.startswith(f"journal-{interval.end_snapshot_id:016x}-")]) == 1
        for resolution in random.permutation(np.array(opened, dtype=object))[:20]:
            for volume in range(len(history.volumes)):
                assert read_image(store, resolution, volume) == history.states[resolution.seq][volume]
    for seq in sorted(history.reachable):
        assert_state(store, history, seq)
    assert os.listdir(os.path.join(ingest.path, "staging")) == []
    store.close()
    ingest.close()


@pytest.mark.parametrize("seed", range(60, 64))
def test_times_list_every_second_that_has_a_reachable_instant(tmp_path: Path, seed: int) -> None:
    history = random_history(seed, max_block_count=4)
    history.step_ns = 20_000_000_000
    ingest = Ingest(str(tmp_path), history.hello)
    for transfer in random_transfers(history, 8):
        ingest_transfer(ingest, transfer)
    store = Store.open(ingest.path)
    found = [
        resolution.seq
        for day in store.days()
        for minute in store.minutes(day)
        for resolution in store.seconds(minute)
    ]
    last_in_second = {history.times_ns[seq] // 1_000_000_000: seq for seq in sorted(history.reachable)}
    assert found == list(last_in_second.values())
    store.close()
    ingest.close()


def test_snapshots_intervals_bookmarks_and_gaps_are_listed(tmp_path: Path) -> None:
    history = random_history(3)
    ingest = Ingest(str(tmp_path), history.hello)
    made = list(random_transfers(history, 10))
    for transfer in made:
        ingest_transfer(ingest, transfer)
    store = Store.open(ingest.path)
    new = [t.manifest for t in made if t.manifest.mark == 1 or t.manifest.to_seq > t.manifest.from_seq]
    assert [(s.seq, s.time_ns, s.mark) for s in store.snapshots()] == [
        (m.to_seq, m.to_time_ns, m.mark) for m in new
    ]
    assert [(i.from_seq, i.to_seq, i.granularity_ns) for i in store.intervals()] == [
        (t.manifest.from_seq, t.manifest.to_seq, t.layers[-1].manifest.granularity_ns if t.layers else None)
        for t in made
        if t.manifest in new[1:]
    ]
    assert {b.name for b in store.bookmarks()} == {b.name for t in made for b in t.manifest.bookmarks}
    assert list(store.gaps()) == [gap for t in made for gap in t.manifest.gaps]
    middle = new[2].to_time_ns
    assert [s.time_ns for s in store.snapshots(middle, new[4].to_time_ns)] == [m.to_time_ns for m in new[2:4]]
    assert [i.to_time_ns for i in store.intervals(middle, None)] == [m.to_time_ns for m in new[2:]]
    store.close()
    ingest.close()
