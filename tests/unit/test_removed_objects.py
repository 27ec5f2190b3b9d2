"""Objects that were replaced don't stay open, and with that take room: neither in the receiver nor in readers."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pitfs.model.transfer import VolumeInfo
from pitfs.store.ingest import Ingest
from pitfs.store.objects import pool
from pitfs.store.store import Store
from pitfs.view.view import PointInTimeView, ReadBuffer
from tests.helpers.stores import ingest_transfer
from tests.helpers.streams import batch_of, mark_of
from tests.helpers.transfers import History

VOLUMES = (VolumeInfo("root", 300_000, 1024), VolumeInfo("data", 5_000, 512))


@pytest.fixture
def history() -> History:
    return History(7, VOLUMES)


@pytest.fixture
def ingest(tmp_path: Path, history: History) -> Iterator[Ingest]:
    made = Ingest(str(tmp_path), history.hello)
    ingest_transfer(made, history.close_interval())
    yield made
    made.close()


def removed(path: str) -> list[str]:
    """Files of the store that are open and have no name any more."""
    gc.collect()
    links = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
    held = (os.readlink(link) for link in links if os.path.lexists(link))
    return [os.path.basename(file) for file in held if file.startswith(path) and file.endswith("(deleted)")]


def images(views: list[PointInTimeView], buffer: ReadBuffer) -> list[bytes]:
    return [bytes(view.read(0, view.size_bytes, buffer)) for view in views]


@pytest.mark.parametrize("way", ["layers", "stream"])
def test_a_reader_lets_go_of_what_another_process_removed_and_its_images_go_on(
    ingest: Ingest, history: History, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(pool, "SWEEP_S", 0.0)
    store, buffer = Store.open(ingest.path), ReadBuffer()
    coarse_ns = 10_000_000_000
    for _ in range(400):
        history.write()
    if way == "layers":
        transfer = history.close_interval(0, before_ns=(coarse_ns, 1_000_000_000))
        finer, transfer.layers = transfer.layers[1:], transfer.layers[:1]
        ingest_transfer(ingest, transfer)
    else:
        ingest.write(batch_of(history.open))
        ingest.publish()
    states = [store.at_seq(seq) for seq in range(150, 400, 60)]
    views = [PointInTimeView(store, state, volume) for state in states for volume in range(2)]
    expected = [history.states[state.seq][volume] for state in states for volume in range(2)]
    assert images(views, buffer) == expected
    if way == "layers":
        for each in finer:
            ingest_transfer(ingest, each)
    else:
        ingest.mark(mark_of(history))
        ingest.stream.wait_for_closing()
        # Another thread may ask for the log just when its interval is gone from the catalog, and its file isn't yet.
        monkeypatch.setattr(store.objects, "forget", lambda name: None)
    assert removed(ingest.path), "the reader has it open"
    assert store.latest() is not None
    assert removed(ingest.path) == []
    assert images(views, buffer) == expected
    store.close()


def test_a_sweep_looks_at_a_bounded_number_and_at_all_in_turn(
    ingest: Ingest, history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "SWEEP_S", 0.0)
    monkeypatch.setattr(pool, "SWEEP_COUNT", 2)
    for _ in range(5):
        history.write()
        ingest_transfer(ingest, history.close_interval())
    store, buffer, looked_at = Store.open(ingest.path), ReadBuffer(), []
    real = os.fstat
    for seq in range(1, 6):
        images([PointInTimeView(store, store.at_seq(seq), volume) for volume in range(2)], buffer)
    paths = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    open_count = len([path for path in paths if path.startswith(store.objects.directory)])
    assert open_count > 6
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", lambda fd: looked_at.append(int(fd)) or real(fd))
        for turn in range(1, open_count // 2 + 2):
            store.objects.sweep()
            assert len(looked_at) <= 2 * turn
    assert len(set(looked_at)) >= open_count // 2
    store.close()


def test_the_receiver_lets_go_of_an_index_that_a_finer_one_took_the_place_of(ingest: Ingest, history: History) -> None:
    for _ in range(400):
        history.write()
    ingest_transfer(ingest, history.close_interval(0, before_ns=(10_000_000_000, 1_000_000_000)))
    assert removed(ingest.path) == []
