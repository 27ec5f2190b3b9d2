"""A stream of writes into a store: all that was acknowledged is readable, exactly, however it came and was closed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from pitfs.model.transfer import VolumeInfo
from pitfs.store.ingest import Ingest
from pitfs.store.store import Resolution, Store
from pitfs.view.view import PointInTimeView, ReadBuffer
from tests.helpers.stores import ingest_transfer
from tests.helpers.streams import FakeClock, batch_of, cut_here, mark_of
from tests.helpers.transfers import History, random_history


@pytest.fixture(autouse=True)
def disk_that_needs_no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here loses power."""
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd: None)


class Streaming:
    """A history that streams into a store which is read all the while."""

    def __init__(self, root: Path, history: History) -> None:
        self.root, self.history = str(root), history
        self.clock = FakeClock()
        self.random = np.random.default_rng([history.seed, 5])
        self.ingest = Ingest(self.root, history.hello, self.clock)
        ingest_transfer(self.ingest, history.close_interval())
        self.store = Store.open(self.ingest.path)
        self.streamed = 0  # of history.open
        self.readable = history.at[0]
        self.views: list[tuple[Resolution, list[PointInTimeView]]] = []
        self.buffer = ReadBuffer()

    def write(self, count: int) -> None:
        for _ in range(count):
            self.history.write()

    def stream(self, count: int) -> None:
        waiting = self.history.open[self.streamed :][:count]
        if waiting:
            self.ingest.write(batch_of(waiting))
            self.streamed += len(waiting)

    @property
    def end(self) -> tuple[int, int]:
        if not self.streamed:
            return self.history.at
        last = self.history.open[self.streamed - 1]
        return last.seq, last.time_ns

    def flush(self) -> None:
        durable = self.ingest.flush(self.end[1] + 10)
        assert (durable.seq, durable.time_ns) == self.end
        assert durable.protected_through_ns == self.store.protected_through_ns()
        self._note_readable()

    def _note_readable(self) -> None:
        latest = self.store.latest()
        assert latest is not None and latest.seq >= self.readable
        self.readable = latest.seq

    def mark(self, bookmark: str | None = None) -> None:
        self.stream(len(self.history.open))
        durable = self.ingest.mark(mark_of(self.history, bookmark))
        self.streamed = 0
        assert (durable.seq, durable.time_ns) == self.history.at
        self.readable = self.history.at[0]

    def reopen(self) -> None:
        self.ingest.close()
        self.ingest = Ingest(self.root, self.history.hello, self.clock)
        welcome = self.ingest.welcome()
        assert welcome.mark == self.history.mark
        end = (welcome.tail_seq, welcome.tail_time_ns) if welcome.tail_seq else (welcome.seq, welcome.time_ns)
        assert end == self.end, "what was written before a process ended is there"
        self.readable = self.end[0]

    def transfer(self, granularity_ns: int | None) -> None:
        cut_here(self.history, self.streamed)
        self.streamed = 0
        ingest_transfer(self.ingest, self.history.close_interval(granularity_ns, before_ns=(50_000_000,)))
        self._note_readable()

    def open_view(self, seq: int) -> None:
        resolution = self.store.at_seq(seq)
        views = [PointInTimeView(self.store, resolution, volume) for volume in range(len(self.history.volumes))]
        self.views.append((resolution, views))

    def check(self, resolution: Resolution, views: list[PointInTimeView]) -> None:
        for volume, view in enumerate(views):
            image = b"".join(
                bytes(view.read(at, min(1 << 16, view.size_bytes - at), self.buffer))
                for at in range(0, view.size_bytes, 1 << 16)
            )
            assert image == self.history.states[resolution.seq][volume]

    def check_some(self) -> None:
        assert self.store.at_seq(self.readable).seq == self.readable
        self.open_view(int(self.random.integers(self.readable + 1)))
        self.open_view(self.readable)
        for index in self.random.permutation(len(self.views))[:6]:
            self.check(*self.views[index])

    def check_all(self) -> None:
        for seq in sorted(seq for seq in self.history.reachable if seq <= self.readable):
            resolution = self.store.at_seq(seq)
            assert (resolution.seq, resolution.time_ns) == (seq, self.history.times_ns[seq])
            views = [PointInTimeView(self.store, resolution, v) for v in range(len(self.history.volumes))]
            self.check(resolution, views)
            assert self.store.at_time(resolution.time_ns) == (resolution, True)
            if seq < self.readable and seq + 1 in self.history.reachable:
                assert self.store.at_time(self.history.times_ns[seq + 1] - 1)[0] == resolution
        for found, views in self.views:
            self.check(found, views)

    def close(self) -> None:
        self.store.close()
        self.ingest.close()


def act(streaming: Streaming, transfers: bool) -> None:
    random, choice = streaming.random, streaming.random.random()
    streaming.clock.now_s += float(random.random()) / 4
    if choice < 0.6:
        streaming.write(int(random.integers(1, 9)))
        streaming.stream(int(random.integers(1, 12)))
    elif choice < 0.75:
        streaming.flush()
    elif choice < 0.83:
        streaming.mark(f"mark-{streaming.history.mark}" if random.random() < 0.5 else None)
    elif choice < 0.88:
        streaming.reopen()
    elif choice < 0.92 and transfers:
        streaming.transfer((0, 10_000_000, None)[int(random.integers(3))])
    else:
        streaming.check_some()


@pytest.mark.parametrize("seed", range(24))
def test_each_streamed_state_is_exact_however_it_was_closed_and_views_stay_right(tmp_path: Path, seed: int) -> None:
    streaming = Streaming(tmp_path, random_history(seed))
    for _ in range(60):
        act(streaming, transfers=seed % 2 == 0)
    streaming.mark()
    streaming.mark()  # of an interval without writes: those before it are closed then
    streaming.check_all()
    assert {i.granularity_ns for i in streaming.store.intervals() if i.cause == "streamed"} <= {0}
    streaming.close()
    objects = os.listdir(os.path.join(streaming.ingest.path, "objects"))
    assert len(objects) == len({*objects})
    assert os.listdir(os.path.join(streaming.ingest.path, "staging")) == []
