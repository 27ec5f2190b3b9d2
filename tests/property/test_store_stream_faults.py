"""A stream that was cut off at any step: what was acknowledged is there, exactly, and the stream goes on."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pitfs.errors import CapacityError, CorruptionError, PitfsError, StoreError
from pitfs.model.transfer import Durable, VolumeInfo
from pitfs.store.catalog import database
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.ingest import Ingest
from pitfs.store.objects.format import ObjectKind, ObjectName
from pitfs.store.open_interval import writer as writer_module
from pitfs.store.open_interval.closing import Closing
from pitfs.store.open_interval.stream import Stream
from pitfs.store.open_interval.writer import OpenIntervalWriter
from pitfs.store.store import Store
from tests.helpers.stores import ingest_transfer, object_files, read_image
from tests.helpers.streams import FakeClock, batch_of, mark_of
from tests.helpers.transfers import History, Write

CALLS = ("pwrite", "fsync", "fdatasync", "rename", "unlink", "ftruncate", "open", "mkdir")
COMMITS = ("commit", "put_open_interval", "protect_through", "drop_open_interval")


def wal_file(open_interval_id: int) -> str:
    return ObjectName(ObjectKind.JOURNAL_BLOCKS, open_interval_id).file


class Killed(BaseException):
    """The process is dead: nothing of it runs after this."""


@pytest.fixture(autouse=True)
def disk_that_needs_no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here loses power: that the syncs are asked for, and when, is counted."""
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd: None)
    monkeypatch.setattr(database, "DURABLE", "OFF")
    monkeypatch.setattr(database, "NOT_DURABLE", "OFF")


@pytest.fixture(autouse=True)
def closing_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps have an order: what a closing does comes when it is waited for."""

    def join(self: Closing) -> None:
        self.run()

    monkeypatch.setattr(Closing, "start", lambda self: None)
    monkeypatch.setattr(Closing, "is_done", property(lambda self: False))
    monkeypatch.setattr(Closing, "join", join)


class Run:
    """A history of two intervals, each of two batches and a mark."""

    def __init__(self) -> None:
        self.history = History(5, (VolumeInfo("a", 9_000, 1024), VolumeInfo("b", 5_000, 512)))
        self.full = self.history.close_interval()
        self.parts: list[list[Write]] = []
        self.marks = []
        for number in range(2):
            for _ in range(2):
                self.parts.append([self.history.write() for _ in range(3)])
            self.marks.append(mark_of(self.history, f"mark-{number}"))
        self.last_seq = self.parts[-1][-1].seq

    def prepare(self, root: str) -> None:
        ingest = Ingest(root, self.history.hello)
        ingest_transfer(ingest, self.full)
        ingest.close()

    def go_on(self, ingest: Ingest, acknowledged: list[Durable], clock: FakeClock) -> None:
        """From where the store stands to the end."""
        welcome = ingest.welcome()
        seq, mark = welcome.streamed_seq or welcome.seq, welcome.mark
        for number, part in enumerate(self.parts):
            left = [write for write in part if write.seq > seq]
            if left:
                ingest.write(batch_of(left))
                acknowledged.append(ingest.flush(left[-1].time_ns))
                clock.now_s += 0.15
            done = self.marks[number // 2]
            if number % 2 and done.mark > mark:
                acknowledged.append(ingest.mark(done))
        acknowledged.append(ingest.flush(self.marks[-1].protected_through_ns))


def wrapped(monkeypatch: pytest.MonkeyPatch, number: int, error: Callable[[], BaseException]) -> list[str]:
    """Call `number` (from 0) of those that change the disk raises; if it kills, all after it do as well."""
    seen: list[str] = []

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            seen.append(name)
            raised = error()
            if len(seen) - 1 == number or (len(seen) > number >= 0 and isinstance(raised, Killed)):
                raise raised
            return real(*arguments, **options)

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, wrap(name, getattr(os, name)))
    for name in COMMITS:
        monkeypatch.setattr(Catalog, name, wrap("commit", getattr(Catalog, name)))
    return seen


def attempt(
    run: Run, root: str, monkeypatch: pytest.MonkeyPatch, number: int, error: Callable[[], BaseException],
    expected: type[BaseException],
) -> tuple[list[Durable], list[str], bool]:  # fmt: skip
    """A session in which call `number` fails; what it acknowledged, the calls, and whether it failed."""
    acknowledged: list[Durable] = []
    clock = FakeClock()
    with monkeypatch.context() as patch:
        seen = wrapped(patch, number, error)
        ingest = None
        try:
            ingest = Ingest(root, run.history.hello, clock)
            run.go_on(ingest, acknowledged, clock)
            ingest.close()
        except expected:
            if ingest is not None:
                with suppress(expected):  # of the dead nothing runs
                    ingest.close()
            return acknowledged, seen, True
    return acknowledged, seen, False


def assert_exact(run: Run, root: str, up_to_seq: int, step: int = 1) -> None:
    store = Store.open(os.path.join(root, "db1"))
    latest = store.latest()
    assert latest is not None and latest.seq >= up_to_seq
    for seq in range(latest.seq, -1, -step):
        found = store.at_seq(seq)
        assert (found.seq, found.time_ns) == (seq, run.history.times_ns[seq])
        for volume in range(2):
            assert read_image(store, found, volume) == run.history.states[seq][volume]
    for bookmark in store.bookmarks():
        assert store.at_instant(bookmark.time_ns) is not None
    store.close()


def finish(run: Run, root: str, acknowledged: list[Durable]) -> None:
    """Opens it again: all that was acknowledged is there, and the rest can come."""
    durable = acknowledged[-1] if acknowledged else Durable(0, 0, 1, 0)
    ingest = Ingest(root, run.history.hello)
    welcome = ingest.welcome()
    assert (welcome.streamed_seq or welcome.seq) >= durable.seq and welcome.mark >= durable.mark
    assert_exact(run, root, durable.seq, step=3)
    run.go_on(ingest, [], FakeClock())
    ingest.close()
    ingest = Ingest(root, run.history.hello)
    welcome = ingest.welcome()
    assert (welcome.mark, welcome.seq, welcome.streamed_seq) == (run.marks[-1].mark, run.last_seq, 0)
    ingest.close()
    assert_exact(run, root, run.last_seq, step=2)
    assert os.listdir(os.path.join(root, "db1", "staging")) == []
    objects = [path.name for path in object_files(os.path.join(root, "db1"))]
    catalog = Catalog(os.path.join(root, "db1", "catalog.sqlite"))
    assert catalog.open_intervals() == () and all(catalog.object(name) is not None for name in objects)
    assert catalog.bookmark("mark-1") is not None
    catalog.close()


def sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException], expected: type[BaseException]
) -> list[str]:
    run = Run()
    source = str(tmp_path / "source")
    run.prepare(source)
    number, calls = 0, list[str]()
    while True:
        root = str(tmp_path / "work")
        shutil.copytree(source, root)
        acknowledged, seen, failed = attempt(run, root, monkeypatch, number, error, expected)
        if not failed and len(seen) <= number:
            calls = seen
            break
        finish(run, root, acknowledged)
        shutil.rmtree(root)
        number += 1
    finish(run, root, acknowledged)
    return calls


def test_killed_at_any_step_what_was_acknowledged_is_there_and_the_stream_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = sweep(tmp_path, monkeypatch, Killed, Killed)
    assert {"pwrite", "fdatasync", "fsync", "rename", "unlink", "commit", "mkdir"} <= set(calls)
    assert len(calls) > 100


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_where_the_disk_refuses_the_stream_goes_on_in_the_next_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    expected = CapacityError if number == errno.ENOSPC else PitfsError
    sweep(tmp_path, monkeypatch, lambda: OSError(number, os.strerror(number)), expected)


def open_interval_left(tmp_path: Path) -> tuple[Run, str, str]:
    """A store with an open interval whose last batch is acknowledged, but not in the catalog: its root, and its WAL."""
    run, root, clock = Run(), str(tmp_path / "open"), FakeClock()
    run.prepare(root)
    ingest = Ingest(root, run.history.hello, clock)
    for part in run.parts[:2]:
        ingest.write(batch_of(part))
        ingest.flush(part[-1].time_ns)
    store = Store.open(ingest.path)
    latest = store.latest()
    assert latest is not None and latest.seq == run.parts[0][-1].seq, "the second isn't due"
    store.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stream, "publish", lambda self: None)  # as a process that is killed leaves it
        ingest.close()
    catalog = Catalog(os.path.join(root, "db1", "catalog.sqlite"))
    (interval,) = catalog.open_intervals()
    catalog.close()
    return run, root, os.path.join(root, "db1", "objects", "0000", "000", wal_file(interval.id))


def test_cut_at_any_byte_the_log_gives_what_is_whole_and_the_stream_goes_on(tmp_path: Path) -> None:
    run, root, log = open_interval_left(tmp_path)
    size, first = os.path.getsize(log), run.parts[0][-1].seq
    wanted = {first, run.parts[1][-1].seq}
    found = set()
    for cut in [size, size - 1, *range(size - 2, 0, -211)]:
        work = str(tmp_path / "work")
        shutil.copytree(root, work)
        os.truncate(os.path.join(work, os.path.relpath(log, root)), cut)
        try:
            ingest = Ingest(work, run.history.hello)
        except CorruptionError as error:
            assert wal_file(2) in str(error)
        else:
            seq = ingest.welcome().streamed_seq
            assert seq in wanted and (seq == first) == (cut < size)
            found.add(seq)
            ingest.close()
            assert_exact(run, work, seq)
            ingest = Ingest(work, run.history.hello)
            run.go_on(ingest, [], FakeClock())
            ingest.close()
            assert_exact(run, work, run.last_seq)
        shutil.rmtree(work)
    assert found == wanted


def test_a_log_that_is_missing_or_another_is_said_to_be_that(tmp_path: Path) -> None:
    run, root, log = open_interval_left(tmp_path)
    data = Path(log).read_bytes()
    os.unlink(log)
    with pytest.raises(CorruptionError, match=r"log of the open interval is missing.*--rebuild"):
        Ingest(root, run.history.hello)
    Path(log).write_bytes(bytes(4096) + data[4096:])
    with pytest.raises(CorruptionError, match="no header of a pitfs object"):
        Ingest(root, run.history.hello)
    Path(log).write_bytes(data)
    assert Path(os.path.dirname(log), wal_file(77)).write_bytes(data)
    with pytest.raises(StoreError, match="is older than the objects"):
        Ingest(root, run.history.hello)
    Path(os.path.dirname(log), wal_file(77)).unlink()
    Ingest(root, run.history.hello).close()
    assert_exact(run, root, run.parts[1][-1].seq)


def test_what_a_failed_sync_may_have_lost_is_written_again_before_it_is_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, root, log = open_interval_left(tmp_path)
    written: list[tuple[int, int]] = []
    events: list[str] = []
    pwrite = os.pwrite

    def note_write(fd: int, data: Any, offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{fd}") == log:
            written.append((offset, offset + len(data)))
            events.append("write")
        return pwrite(fd, data, offset)

    catalog = Catalog(os.path.join(root, "db1", "catalog.sqlite"))
    (interval,) = catalog.open_intervals()
    catalog.close()
    end = os.path.getsize(log)
    monkeypatch.setattr(os, "pwrite", note_write)
    monkeypatch.setattr(os, "fdatasync", lambda fd: events.append("sync"))
    Ingest(root, run.history.hello).close()
    assert written[0] == (interval.wal_end, end)
    assert events[:2] == ["write", "sync"]


def test_a_flush_that_brings_writes_costs_one_sync_of_the_log_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, root, clock = Run(), str(tmp_path), FakeClock()
    run.prepare(root)
    ingest = Ingest(root, run.history.hello, clock)
    ingest.write(batch_of(run.parts[0][:1]))
    ingest.flush(run.parts[0][0].time_ns)
    synced: list[str] = []
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    for write in run.parts[0][1:]:
        ingest.write(batch_of([write]))
        ingest.flush(write.time_ns)
        clock.now_s += 0.3
    ingest.flush(run.parts[0][-1].time_ns + 5)
    assert [os.path.basename(path) for path in synced] == [wal_file(2)] * (len(run.parts[0]) - 1)
    assert ingest.flush(0).protected_through_ns == run.parts[0][-1].time_ns + 5
    ingest.close()


@pytest.mark.parametrize("most_rows", [1 << 16, 8])
def test_a_catalog_that_lost_what_was_not_durable_of_it_is_made_up_from_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_rows: int
) -> None:
    """Power is lost: commits that weren't synced are gone, the log has all that was acknowledged."""
    monkeypatch.setattr(writer_module, "MAX_PENDING_ROWS", most_rows)
    added, real = list[int](), OpenIntervalWriter._add

    def add(writer: OpenIntervalWriter, *columns: Any) -> None:
        real(writer, *columns)
        added.append(writer.pending_rows)

    monkeypatch.setattr(OpenIntervalWriter, "_add", add)
    history, clock = History(6, (VolumeInfo("a", 9_000, 1024),)), FakeClock()
    ingest = Ingest(str(tmp_path / "now"), history.hello, clock)
    ingest_transfer(ingest, history.close_interval())
    lost = str(tmp_path / "lost")
    for number in range(30):
        ingest.write(batch_of([history.write() for _ in range(3)]))
        clock.now_s += 1
        durable = ingest.flush(history.times_ns[-1])
        if number in (0, 9, 20):  # the catalog as of then, with what came to the log later
            os.makedirs(f"{lost}-{number}", exist_ok=True)
            for name in os.listdir(ingest.path):
                if name.startswith("catalog.sqlite"):
                    shutil.copy(os.path.join(ingest.path, name), f"{lost}-{number}")
    for number in (0, 9, 20):
        root = str(tmp_path / f"after-{number}")
        shutil.copytree(ingest.path, os.path.join(root, "db1"))
        for name in os.listdir(os.path.join(root, "db1")):
            if name.startswith("catalog.sqlite"):
                os.unlink(os.path.join(root, "db1", name))
        for name in os.listdir(f"{lost}-{number}"):
            shutil.copy(os.path.join(f"{lost}-{number}", name), os.path.join(root, "db1"))
        store = Store.open(os.path.join(root, "db1"))
        latest = store.latest()
        assert latest is not None and latest.seq == 3 * (number + 1)
        assert read_image(store, latest, 0) == history.states[latest.seq][0], "until then it is readable as it was"
        again = Ingest(root, history.hello)
        assert again.welcome().streamed_seq == durable.seq == 90
        for seq in range(91):
            assert read_image(store, store.at_seq(seq), 0) == history.states[seq][0]
        assert store.protected_through_ns() == history.times_ns[-1]
        store.close()
        again.close()
    assert max(added) <= most_rows + 3 * 4, "no more wait in memory than a batch behind the limit"
    ingest.close()
