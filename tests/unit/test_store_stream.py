"""A stream into a store: what is refused, when it becomes readable, what it says."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from pitfs.cli.main import main
from pitfs.errors import (
    CapacityError,
    CorruptionError,
    PitfsError,
    PositionMismatchError,
    RemoteProtocolError,
)
from pitfs.model.position import format_instant
from pitfs.model.transfer import MAX_BATCH_ROWS, WRITE, StreamMark, TransferKind, VolumeInfo, Writes
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.ingest import Ingest
from pitfs.store.objects.format import CATALOG
from pitfs.store.open_interval import sorted_runs, stream
from pitfs.store.open_interval.closing import Closing
from pitfs.store.store import Store
from tests.helpers.stores import ingest_transfer, object_files, read_image
from tests.helpers.streams import FakeClock, batch_of, cut_here, mark_of
from tests.helpers.transfers import History

VOLUMES = (VolumeInfo("a", 9_000, 1024), VolumeInfo("b", 5_000, 512))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def history() -> History:
    return History(5, VOLUMES)


@pytest.fixture
def ingest(tmp_path: Path, history: History, clock: FakeClock) -> Iterator[Ingest]:
    made = Ingest(str(tmp_path), history.hello, clock)
    ingest_transfer(made, history.close_interval())
    yield made
    made.close()


@pytest.fixture
def store(ingest: Ingest) -> Iterator[Store]:
    opened = Store.open(ingest.path)
    yield opened
    opened.close()


def write(ingest: Ingest, history: History, count: int = 3) -> Writes:
    batch = batch_of([history.write() for _ in range(count)])
    ingest.write(batch)
    return batch


def latest_seq(store: Store) -> int:
    latest = store.latest()
    assert latest is not None
    return latest.seq


# What is refused


def test_an_empty_store_takes_a_full_copy_first(tmp_path: Path, history: History) -> None:
    ingest = Ingest(str(tmp_path), history.hello)
    with pytest.raises(PositionMismatchError, match="takes a full sync first"):
        ingest.write(batch_of([history.write()]))
    with pytest.raises(PositionMismatchError, match="mark 1, the store has 0"):
        ingest.mark(StreamMark(1, 0, 0, 0))
    assert ingest.flush(7).seq == 0
    ingest.close()


def test_writes_that_do_not_lead_on_are_refused_and_those_that_do_are_taken_then(
    ingest: Ingest, history: History
) -> None:
    one, two, three = (history.write() for _ in range(3))
    with pytest.raises(PositionMismatchError, match="from seq 2 on, the store ends at seq 0"):
        ingest.write(batch_of([two]))
    ingest.write(batch_of([one]))
    with pytest.raises(PositionMismatchError, match="from seq 1 on, the store ends at seq 1"):
        ingest.write(batch_of([one]))
    with pytest.raises(PositionMismatchError, match="has one of"):
        ingest.write(batch_of([replace(two, time_ns=one.time_ns)]))
    with pytest.raises(RemoteProtocolError, match="don't go forward"):
        ingest.write(batch_of([two, replace(three, time_ns=two.time_ns)]))
    ingest.write(batch_of([two, three]))
    assert ingest.flush(three.time_ns).seq == 3


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("volume", 2, "volume 2 of 2"),
        ("volume", 1, "bytes of contents where the rows name"),
        ("block", 9, "behind the end"),
        ("block", 8, "behind the end"),
        ("block", 1 << 63, "behind the end"),
        ("block_count", 0, "without blocks"),
        ("block_count", 3, "bytes of contents where the rows name"),
        ("block_count", (1 << 32) - 1, "behind the end"),
        ("reserved", 1, "doesn't know"),
        ("time_ns", (1 << 63) - 1, "don't go forward"),
    ],
)
def test_rows_that_cannot_be_are_refused(
    ingest: Ingest, history: History, field: str, value: int, problem: str
) -> None:
    batch = batch_of([replace(history.write(), volume=0, block=2, contents=[b"x" * 1024] * 2)])
    rows = batch.rows.copy()
    rows[field] = value
    with pytest.raises(RemoteProtocolError, match=f"{problem}.*nothing of them is applied"):
        ingest.write(replace(batch, rows=rows))
    ingest.write(batch)


def test_contents_other_than_at_the_splitter_are_refused(ingest: Ingest, history: History) -> None:
    batch = batch_of([history.write()])
    with pytest.raises(RemoteProtocolError, match="taken at the splitter"):
        ingest.write(replace(batch, contents=bytes(batch.contents[:-1]) + b"?"))
    with pytest.raises(RemoteProtocolError, match="bytes of contents"):
        ingest.write(replace(batch, contents=batch.contents[:-1]))
    ingest.write(batch)


def test_a_batch_of_no_writes_or_too_many_is_refused(ingest: Ingest) -> None:
    for count in (0, MAX_BATCH_ROWS + 1):
        with pytest.raises(RemoteProtocolError, match=f"{count} writes"):
            ingest.write(Writes(1, np.zeros(count, WRITE), b"", 0))


def test_a_mark_elsewhere_is_refused(ingest: Ingest, history: History) -> None:
    write(ingest, history)
    mark = mark_of(history)
    refused: list[tuple[StreamMark, type[PitfsError], str]] = [
        (msgspec.structs.replace(mark, mark=4), PositionMismatchError, "mark 4, the store has 1"),
        (msgspec.structs.replace(mark, mark=1), PositionMismatchError, "mark 1, the store has 1"),
        (msgspec.structs.replace(mark, seq=2), PositionMismatchError, "at seq 2, the store is at seq 3"),
        (msgspec.structs.replace(mark, time_ns=1), PositionMismatchError, "at seq 3"),
        (msgspec.structs.replace(mark, protected_through_ns=1), RemoteProtocolError, "don't go forward"),
        (msgspec.structs.replace(mark, bookmark="../x"), RemoteProtocolError, "bookmark '../x'"),
    ]
    for each, error, problem in refused:
        with pytest.raises(error, match=problem):
            ingest.mark(each)
    assert ingest.mark(mark).seq == 3


def test_a_transfer_that_does_not_lead_on_from_the_stream_leaves_it_as_it_is(
    ingest: Ingest, history: History, store: Store
) -> None:
    batch = write(ingest, history)
    end_ns = ingest.flush(0).time_ns
    cut_here(history, 2)  # production believes that it ended before the last write
    history.write()
    transfer = history.close_interval()
    with pytest.raises(PositionMismatchError, match="follows seq 2"):
        ingest.begin(transfer.manifest)
    assert len(list(store.snapshots())) == 1
    welcome = ingest.welcome()
    assert (welcome.streamed_seq, welcome.streamed_time_ns) == (3, end_ns)
    assert batch.first_seq == 1


def test_writes_are_refused_while_a_transfer_has_them(ingest: Ingest, history: History) -> None:
    history.write()
    transfer = history.close_interval()
    transfer.layers = []
    ingest.begin(transfer.manifest)
    with pytest.raises(RemoteProtocolError, match="while a transfer is under way"):
        ingest.write(batch_of([history.write()]))
    ingest.park(())
    ingest_transfer(ingest, transfer)  # it goes on as if nothing had been


def test_a_stream_takes_the_place_of_a_transfer_that_was_put_off(ingest: Ingest, history: History) -> None:
    writes = [history.write() for _ in range(4)]
    other = History(5, VOLUMES)
    other.close_interval()
    for _ in writes:
        other.write()
    ingest.begin(other.close_interval().manifest)
    ingest.park((1,))
    ingest.write(batch_of(writes))
    staging = os.path.join(ingest.path, "staging")
    assert os.listdir(staging) == []
    ingest.mark(mark_of(history))


def test_a_transfer_that_follows_closes_what_was_streamed_under_the_mark_before_it(
    ingest: Ingest, history: History, store: Store
) -> None:
    write(ingest, history, 5)
    cut_here(history, 5)
    for _ in range(3):
        history.write()
    closed = history.close_interval()
    ingest.begin(closed.manifest)
    welcome = ingest.welcome()
    assert (welcome.mark, welcome.streamed_seq, welcome.end) == (1, 5, (5, history.times_ns[5])), "not where mark 1 is"
    ingest_transfer(ingest, closed)
    assert [(s.seq, s.mark) for s in store.snapshots()] == [(0, 1), (5, 1), (8, 2)]
    assert ingest.welcome().streamed_seq == 0
    assert [(i.to_seq, i.granularity_ns) for i in store.intervals()] == [(5, 0), (8, 0)]
    write(ingest, history)
    cut_here(history, 3)
    history.write()
    full = history.close_interval(full=True)
    assert full.manifest.kind is TransferKind.FULL
    ingest_transfer(ingest, full)
    assert [(s.seq, s.mark) for s in store.snapshots()][3:] == [(11, 2), (12, 3)]
    for seq in (*range(12), 12):
        for volume in range(2):
            assert read_image(store, store.at_seq(seq), volume) == history.states[seq][volume]


def test_an_old_copy_of_a_sender_shuts_nobody_out_unless_its_writes_lead_on(tmp_path: Path, history: History) -> None:
    first = msgspec.structs.replace(history.hello, epoch=3, instance=7)
    ingest = Ingest(str(tmp_path), first)
    ingest_transfer(ingest, history.close_interval())
    write(ingest, history)
    ingest.close()
    copy = Ingest(str(tmp_path), msgspec.structs.replace(first, epoch=4, instance=8))
    with pytest.raises(PositionMismatchError):
        copy.write(batch_of([replace(history.write(), seq=1)]))
    with pytest.raises(PositionMismatchError):
        copy.mark(StreamMark(9, 0, 0, 0))
    copy.close()
    ingest = Ingest(str(tmp_path), first)
    ingest.write(batch_of(history.open[-1:]))
    ingest.close()
    other = Ingest(str(tmp_path), msgspec.structs.replace(first, epoch=5, instance=9))
    write(other, history)
    other.close()
    with pytest.raises(PositionMismatchError, match="another production host sends"):
        Ingest(str(tmp_path), first)


# When what came can be read


def test_what_came_is_readable_within_a_quarter_of_a_second_and_durable_at_once(
    ingest: Ingest, history: History, store: Store, clock: FakeClock
) -> None:
    versions, seqs = [], []
    for _ in range(40):  # 20 flushes a second
        write(ingest, history, 1)
        durable = ingest.flush(history.times_ns[-1])
        assert durable.seq == history.open[-1].seq
        versions.append(store.data_version())
        seqs.append(latest_seq(store))
        clock.now_s += 0.05
    lags = [number + 1 - seq for number, seq in enumerate(seqs)]
    assert max(lags) * 0.05 <= stream.READABLE_S
    assert len(set(versions)) <= 2 / stream.READABLE_S + 1
    clock.now_s += 1
    durable = ingest.flush(history.times_ns[-1] + 5_000)
    assert latest_seq(store) == 40 and durable.protected_through_ns == history.times_ns[-1] + 5_000
    assert store.at_time(history.times_ns[-1] + 5_000)[1]


def test_many_rows_do_not_wait_for_a_flush(
    ingest: Ingest, history: History, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "MAX_PENDING_ROWS", 20)
    for _ in range(20):
        write(ingest, history, 2)
    assert latest_seq(store) > 20
    latest = store.latest()
    assert latest is not None and store.at_time(latest.time_ns) == (latest, True)


def test_sorted_runs_stay_few_and_merges_bounded(
    ingest: Ingest, history: History, store: Store, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sorted_runs, "MAX_MERGED_ROWS", 300)
    catalog = Catalog(os.path.join(ingest.path, CATALOG))
    most = 0
    for _ in range(150):
        write(ingest, history, 2)
        clock.now_s += 1
        ingest.flush(0)
        (interval,) = catalog.open_intervals()
        most = max(most, len(interval.runs))
        assert [run.first_seq for run in interval.runs] == [1, *(run.to_seq + 1 for run in interval.runs[:-1])]
        assert all(run.row_count <= 300 for run in interval.runs)
    catalog.close()
    assert sum(run.row_count for run in interval.runs) == sum(len(w.contents) for w in history.open)
    assert most <= 3 * 4 + 3  # three of each of four levels, and as many large ones as the rows make
    for seq in range(0, 301, 7):
        assert read_image(store, store.at_seq(seq), 0) == history.states[seq][0]


# What is said


def test_list_shows_the_open_interval_and_times_its_seconds(
    ingest: Ingest, history: History, store: Store, clock: FakeClock, capsys: pytest.CaptureFixture[str]
) -> None:
    history.step_ns = 3_000_000_000
    write(ingest, history, 9)
    ingest.flush(history.times_ns[-1])
    assert main(["list", ingest.path, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["intervals"] == []
    (interval,) = document["open_intervals"]
    assert interval == {
        "from": format_instant(history.times_ns[0]), "to": format_instant(history.times_ns[9]),
        "granularity_ns": 0, "cause": "streaming", "from_seq": 0, "to_seq": 9,
    }  # fmt: skip
    assert document["protected_through"] == interval["to"]
    days = list(store.days())
    found = [r.seq for day in days for minute in store.minutes(day) for r in store.seconds(minute)]
    last = {time_ns // 10**9: seq for seq, time_ns in enumerate(history.times_ns[:10])}
    assert found == list(last.values())
    assert main(["resolve", ingest.path, "latest", "--json"]) == 0
    resolved = json.loads(capsys.readouterr().out)
    assert (resolved["seq"], resolved["kind"], resolved["granularity_ns"]) == (9, "intermediary", 0)
    assert list(store.open_intervals(to_ns=history.times_ns[0])) == []
    assert len(list(store.open_intervals(from_ns=history.times_ns[9]))) == 1
    assert list(store.open_intervals(from_ns=history.times_ns[9] + 1)) == []


def test_after_an_error_of_the_disk_the_session_ends_and_the_next_one_goes_on(
    tmp_path: Path, ingest: Ingest, history: History, monkeypatch: pytest.MonkeyPatch, clock: FakeClock
) -> None:
    write(ingest, history)
    acknowledged = ingest.flush(0).seq
    waiting = batch_of([history.write()])

    def fails(fd: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fails)
        ingest.write(waiting)
        with pytest.raises(PitfsError, match="making it durable"):
            ingest.flush(0)
    with pytest.raises(PitfsError, match="can't go on after an error: begin the session anew"):
        ingest.flush(0)
    ingest.close()
    again = Ingest(str(tmp_path), history.hello, clock)
    assert again.welcome().streamed_seq in (acknowledged, waiting.first_seq)
    again.close()


def test_what_a_closing_raises_comes_with_the_next_call_and_is_made_up_for_at_the_next_start(
    tmp_path: Path, ingest: Ingest, history: History, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(ingest, history)
    run = Closing.run

    def full(self: Closing) -> None:
        raise CapacityError("objects: no room")

    monkeypatch.setattr(Closing, "run", full)
    ingest.mark(mark_of(history, "here"))
    with pytest.raises(CapacityError, match="no room"):
        ingest.stream.wait_for_closing()
    with pytest.raises(PitfsError, match="begin the session anew"):
        write(ingest, history)
    assert latest_seq(store) == 3, "reading goes on"
    assert store.bookmark("here") is None
    ingest.close()
    with pytest.raises(CapacityError):
        Ingest(str(tmp_path), history.hello)
    monkeypatch.setattr(Closing, "run", run)
    again = Ingest(str(tmp_path), history.hello)
    welcome = again.welcome()
    assert (welcome.mark, welcome.seq, welcome.streamed_seq) == (2, 3, 0)
    assert store.bookmark("here") is not None
    again.close()


def test_a_sorted_run_that_changed_on_the_disk_is_noticed(
    ingest: Ingest, history: History, store: Store, clock: FakeClock
) -> None:
    write(ingest, history, 12)
    ingest.flush(0)
    catalog = Catalog(os.path.join(ingest.path, CATALOG))
    (interval,) = catalog.open_intervals()
    catalog.close()
    (path,) = object_files(ingest.path, f"journal-{interval.id:016x}.blocks")
    data, (run,) = path.read_bytes(), interval.runs
    for offset in (run.sparse_index_offset + 8, run.sparse_index_offset - 40):
        damaged = bytearray(data)
        damaged[offset] ^= 1
        path.write_bytes(damaged)
        opened = Store.open(ingest.path)
        with pytest.raises(CorruptionError, match="don't match their checksum"):
            opened.at_seq(5)
        opened.close()
    path.write_bytes(data)
    assert store.at_seq(5).seq == 5
