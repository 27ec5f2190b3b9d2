"""A stream of writes into a store: all that was acknowledged is readable, exactly, however it came and was closed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pitfs.model.transfer import Begin
from pitfs.store.catalog import database
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.ingest import Ingest
from pitfs.store.objects.format import CATALOG
from pitfs.store.open_interval.closing import Closing
from pitfs.store.store import Resolution, Store
from pitfs.view.view import PointInTimeView, ReadBuffer
from tests.helpers.stores import feed, ingest_transfer, object_files, read_image
from tests.helpers.streams import FakeClock, batch_of, cut_here, mark_of
from tests.helpers.transfers import History, random_history


@pytest.fixture(autouse=True)
def disk_that_needs_no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here loses power."""
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd: None)
    monkeypatch.setattr(database, "DURABLE", "OFF")
    monkeypatch.setattr(database, "NOT_DURABLE", "OFF")


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
        assert welcome.end == self.end, "what was written before a process ended is there"
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
    catalog = Catalog(os.path.join(streaming.ingest.path, CATALOG))
    for path in object_files(streaming.ingest.path):
        assert catalog.object(path.name) is not None, "no log is left"
    catalog.close()
    assert os.listdir(os.path.join(streaming.ingest.path, "staging")) == []


@contextmanager
def closings_held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Closings begin when the event is set."""
    released = threading.Event()
    run = Closing.run

    def wait_and_run(self: Closing) -> None:
        assert released.wait(60)
        run(self)

    with monkeypatch.context() as patch:
        patch.setattr(Closing, "run", wait_and_run)
        try:
            yield released
        finally:
            released.set()


@pytest.mark.parametrize("seed", range(30, 36))
def test_while_an_interval_is_closed_it_is_read_as_is_the_next_one_and_what_is_open_stays_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    streaming = Streaming(tmp_path, random_history(seed))
    with closings_held(monkeypatch) as released:
        for part in range(8):
            streaming.write(7)
            streaming.stream(7)
            streaming.clock.now_s += 1
            streaming.flush()
            if part == 3:
                streaming.mark("middle")
        history, store = streaming.history, streaming.store
        assert streaming.readable == history.open[-1].seq and len(list(store.snapshots())) == 1
        assert not list(store.intervals())
        intervals = list(store.open_intervals())
        middle = history.at
        assert [(i.from_seq, i.to_seq, i.granularity_ns, i.cause) for i in intervals] == [
            (0, middle[0], 0, "streaming"), (middle[0], streaming.readable, 0, "streaming")
        ]  # fmt: skip
        durable = streaming.ingest.flush(streaming.end[1])
        assert (durable.seq, durable.mark) == (streaming.readable, history.mark - 1), "the mark isn't committed yet"
        welcome = streaming.ingest.welcome()
        assert (welcome.mark, welcome.seq, welcome.streamed_seq) == (history.mark - 1, 0, durable.seq)
        history.reachable |= set(range(streaming.readable + 1))
        streaming.check_all()
        for seq in range(0, streaming.readable + 1, 3):
            streaming.open_view(seq)
            streaming.check(*streaming.views[-1])
        released.set()
        streaming.ingest.stream.wait_for_closing()
    assert [(s.seq, s.mark) for s in store.snapshots()] == [(0, 1), (middle[0], history.mark)]
    assert store.bookmark("middle") is not None
    assert streaming.ingest.flush(streaming.end[1]).mark == history.mark
    for _ in range(2):  # tables that lead to the log, then what they are resolved to anew
        for resolution, views in streaming.views:
            streaming.check(resolution, views)
    streaming.mark()
    streaming.mark()
    streaming.check_all()
    streaming.close()


def test_a_reader_lets_go_of_a_log_that_was_removed(tmp_path: Path) -> None:
    streaming = Streaming(tmp_path, random_history(40))
    for _ in range(12):
        streaming.write(6)
        streaming.stream(6)
        streaming.clock.now_s += 1
        streaming.flush()
        streaming.open_view(streaming.readable)
        streaming.check(*streaming.views[-1])
        streaming.mark()
        streaming.ingest.stream.wait_for_closing()
    assert streaming.store.latest() is not None
    held = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.lexists(entry.path)]
    assert [path for path in held if path.startswith(str(tmp_path)) and path.endswith("(deleted)")] == []
    streaming.close()


@pytest.mark.parametrize("seed", range(50, 56))
def test_a_streamed_interval_is_what_the_same_one_is_that_came_as_transfers(tmp_path: Path, seed: int) -> None:
    streamed, sent = random_history(seed), random_history(seed)
    streaming = Streaming(tmp_path / "streamed", streamed)
    ingest = Ingest(str(tmp_path / "sent"), sent.hello)
    ingest_transfer(ingest, sent.close_interval())
    for _ in range(4):
        streaming.write(15)
        for _ in range(15):
            sent.write()
        streaming.stream(9)
        streaming.flush()
        streaming.mark()
        ingest_transfer(ingest, sent.close_interval(before_ns=(50_000_000,)))
        sent.protected_ns = streamed.protected_ns
    streaming.mark()
    store = Store.open(ingest.path)
    one, other = streaming.store, store
    assert [(s.seq, s.time_ns, s.mark) for s in one.snapshots()] == [
        (s.seq, s.time_ns, s.mark) for s in other.snapshots()
    ]

    def facts(store: Store) -> list[tuple[object, ...]]:
        return [
            (i.from_seq, i.from_time_ns, i.to_seq, i.to_time_ns, i.first_time_ns, i.granularity_ns, i.journal_rows)
            for i in store.intervals()
        ]

    assert facts(one) == facts(other)
    for day in one.days():
        assert list(one.minutes(day)) == list(other.minutes(day))
        for minute in one.minutes(day):
            assert [r.seq for r in one.seconds(minute)] == [r.seq for r in other.seconds(minute)]
    for seq in range(streamed.at[0] + 1):
        mine, theirs = one.at_seq(seq), other.at_seq(seq)
        assert (mine.seq, mine.time_ns, mine.kind, mine.granularity_ns) == (
            theirs.seq, theirs.time_ns, theirs.kind, theirs.granularity_ns
        )  # fmt: skip
        for volume in range(len(streamed.volumes)):
            assert read_image(one, mine, volume) == read_image(other, theirs, volume) == sent.states[seq][volume]
    store.close()
    ingest.close()
    streaming.close()


@pytest.mark.parametrize("seed", range(60, 66))
def test_layers_of_earlier_intervals_come_in_between(tmp_path: Path, seed: int) -> None:
    streaming = Streaming(tmp_path, random_history(seed))
    history = streaming.history
    streaming.write(25)
    transfer = history.close_interval(before_ns=(100_000_000, 10_000_000))
    layers, transfer.layers = transfer.layers, []
    ingest_transfer(streaming.ingest, transfer)
    for layer in layers:
        resumed = streaming.ingest.begin(layer.manifest)
        for frame in layer.frames(streaming.random, resumed.lengths):
            if isinstance(frame, Begin):
                continue
            streaming.write(3)
            streaming.stream(3)
            if streaming.random.random() < 0.5:
                streaming.clock.now_s += 0.2
                streaming.flush()
            if streaming.random.random() < 0.2:
                streaming.mark()
            feed(streaming.ingest, frame)
    streaming.mark()
    streaming.mark()
    assert [i.granularity_ns for i in streaming.store.intervals()] == [0] * len(list(streaming.store.intervals()))
    streaming.check_all()
    streaming.close()


@pytest.mark.parametrize("seed", range(70, 73))
def test_a_reader_in_another_thread_never_sees_anything_else(tmp_path: Path, seed: int) -> None:
    """Answers are those of one moment, whatever is closed while they are made."""
    streaming = Streaming(tmp_path, random_history(seed, max_block_count=12))
    history, done, problems = streaming.history, threading.Event(), list[str]()

    def read() -> None:
        store, buffer = Store.open(streaming.ingest.path), ReadBuffer()
        random = np.random.default_rng(seed)
        try:
            while not done.is_set():
                protected_ns, latest = store.protected_through_ns(), store.latest()
                assert latest is not None
                seq = int(random.integers(latest.seq + 1))
                time_ns = history.times_ns[seq]
                for found in (store.at_seq(seq), latest, store.at_time(min(time_ns, protected_ns))[0]):
                    for volume in range(len(history.volumes)):
                        view = PointInTimeView(store, found, volume)
                        image = bytes(view.read(0, min(view.size_bytes, 1 << 20), buffer))
                        if image != history.states[found.seq][volume]:
                            problems.append(f"seq {found.seq}")
                if time_ns <= protected_ns and store.at_time(time_ns)[0].seq != seq:
                    problems.append(f"{time_ns} ns leads to another state than seq {seq}")
                if history.times_ns[store.at_time(protected_ns)[0].seq] < latest.time_ns <= protected_ns:
                    problems.append("an older state than the latest before it")
        except Exception as error:
            problems.append(repr(error))
        finally:
            store.close()

    thread = threading.Thread(target=read)
    thread.start()
    for _ in range(25):
        streaming.write(5)
        streaming.stream(5)
        streaming.clock.now_s += 1
        streaming.flush()
        streaming.mark()
    done.set()
    thread.join()
    streaming.close()
    assert problems == []
