"""A catalog that is made again lists and gives what the lost one did, and its store goes on."""

from __future__ import annotations

import itertools
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pitfs.errors import CorruptionError, StoreError
from pitfs.model.transfer import VolumeInfo
from pitfs.store.catalog import database
from pitfs.store.catalog import log as log_module
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.catalog.log import HEADER_BYTES, CatalogLog, LoggedDatabase
from pitfs.store.check.check import check
from pitfs.store.check.rebuild import RebuildReport, rebuild
from pitfs.store.ingest import Ingest
from pitfs.store.objects.format import CATALOG, CATALOG_LOG
from pitfs.store.open_interval.stream import Stream
from pitfs.store.retention import pruner as pruner_module
from pitfs.store.retention.pruner import Pruner
from pitfs.store.store import Store
from tests.helpers.retention import assert_tidy, model_of
from tests.helpers.stores import ingest_transfer, object_files, read_image
from tests.helpers.streams import FakeClock, batch_of, mark_of
from tests.helpers.transfers import History, random_history
from tests.property.test_retention import actions_for
from tests.property.test_store_stream import Streaming, act, closings_held

Rows = dict[str, list[tuple[Any, ...]]]


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture(autouse=True)
def disk_that_needs_no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here loses power."""
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd: None)
    monkeypatch.setattr(database, "DURABLE", "OFF")
    monkeypatch.setattr(database, "NOT_DURABLE", "OFF")


def made_again(store: Path) -> tuple[RebuildReport, list[str]]:
    said: list[str] = []
    return rebuild(str(store), said.append, lambda number: None), said


def without_catalog(store: Path) -> None:
    for path in store.glob(f"{CATALOG}*"):
        path.unlink()


def rows_of(store: Path) -> Rows:
    """All that a catalog has, but for the log that it names and where its sorted runs are."""
    with closing(Catalog(str(store / CATALOG))) as catalog:
        tables = catalog.rows("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
        found = {table: catalog.rows(f"SELECT * FROM {table}") for (table,) in tables if table != "pieces"}
    found["meta"] = [row for row in found["meta"] if not row[0].startswith("log") and row[0] != "written_over"]
    found["tails"] = [(*row[:8], *row[9:-1]) for row in found["tails"]]
    return found


def check_states(store: Path, history: History, last_seq: int, step: int = 1) -> None:
    """Every state that can be reached is what it was, by its number and by its time."""
    with closing(Store.open(str(store))) as opened:
        for seq in sorted(seq for seq in history.reachable if seq <= last_seq)[::-step]:
            found = opened.at_seq(seq)
            assert (found.seq, found.time_ns) == (seq, history.times_ns[seq])
            assert opened.at_time(found.time_ns) == (found, True)
            for volume, image in enumerate(history.states[seq]):
                assert read_image(opened, found, volume) == image


def a_history(root: Path, seed: int, acts: int = 40) -> tuple[Streaming, Path]:
    """Streams, layers, coarse intervals, gaps, bookmarks, marks without writes; with an open interval, or not."""
    streaming = Streaming(root, random_history(seed))
    for number in range(acts):
        act(streaming, transfers=True)
        if number == acts // 2:
            streaming.mark()
            streaming.mark(f"empty-{seed}")
            streaming.write(3)
            ingest_transfer(streaming.ingest, streaming.history.close_interval(full=True))
    if seed % 3 == 0:
        streaming.mark("end")
    streaming.readable = streaming.end[0]
    streaming.history.reachable |= set(range(streaming.history.at[0], streaming.readable + 1))
    return streaming, Path(streaming.ingest.path)


@pytest.mark.parametrize("seed", range(10))
def test_the_catalog_made_again_is_the_one_that_was_lost(tmp_path: Path, seed: int) -> None:
    streaming, store = a_history(tmp_path, seed)
    history, clock = streaming.history, FakeClock()
    streaming.close()
    with closing(Ingest(str(tmp_path), history.hello, clock)) as ingest:
        welcome = ingest.welcome()
    lost = rows_of(store)
    how = seed % 4
    if how == 0:
        without_catalog(store)
    elif how == 1:
        os.truncate(store / CATALOG, 5000)
    elif how == 2:
        (store / CATALOG).write_bytes(os.urandom(100_000))
    report, said = made_again(store)
    assert (said, report.missing) == ([], 0)
    assert rows_of(store) == lost
    assert [report.snapshots, report.intervals, report.bookmarks, report.gaps] == [
        len(lost[table]) for table in ("snapshots", "intervals", "bookmarks", "gaps")
    ]
    assert bool(report.old) == (how != 0) and (not report.old or os.path.exists(report.old))
    check_states(store, history, streaming.readable, step=3)
    with closing(Ingest(str(tmp_path), history.hello, clock)) as ingest:
        assert ingest.welcome() == welcome
        history.open = history.open[streaming.streamed :]  # it was on its way
        if history.open:
            ingest.write(batch_of(history.open))
        ingest.write(batch_of([history.write() for _ in range(9)]))
        history.open = []
        ingest.flush(history.times_ns[-1])
        history.reachable |= set(range(streaming.readable, len(history.states)))
    check_states(store, history, len(history.states) - 1, step=5)


@pytest.mark.parametrize("seed", range(20, 26))
def test_without_a_log_all_states_come_back_from_the_objects(tmp_path: Path, seed: int) -> None:
    streaming, store = a_history(tmp_path, seed)
    streaming.close()
    lost = rows_of(store)
    without_catalog(store)
    (store / CATALOG_LOG).unlink()
    report, said = made_again(store)
    found = rows_of(store)
    assert report.missing == 0 and len(said) == 1 and "only what objects say" in said[0]
    assert [row[:8] for row in found["intervals"]] == [row[:8] for row in lost["intervals"]]
    for table in ("snapshots", "roots", "minutes", "tails"):
        assert found[table] == lost[table]
    assert {row[0] for row in lost["bookmarks"]} - {row[0] for row in found["bookmarks"]} <= {
        row[0] for row in lost["bookmarks"] if row[0].startswith(("empty", "mark", "end"))
    }
    check_states(store, streaming.history, streaming.readable, step=3)
    Ingest(str(tmp_path), streaming.history.hello).close()


def killed_while_closing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> tuple[Streaming, Path]:
    """A copy of a store, made while one interval was closed and the next one open."""
    root = tmp_path / "was"
    streaming = Streaming(root, random_history(seed))
    with closings_held(monkeypatch) as released:
        for part in range(6):
            streaming.write(7)
            streaming.stream(7)
            streaming.clock.now_s += 1
            streaming.flush()
            if part == 3:
                streaming.mark("middle")
        shutil.copytree(root, tmp_path / "killed")
        history = streaming.history
        history.reachable |= set(range(streaming.readable + 1))
        released.set()
    streaming.close()
    return streaming, tmp_path / "killed" / "db1"


@pytest.mark.parametrize("with_log", [True, False])
def test_a_closing_that_was_under_way_is_finished_by_the_receiver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_log: bool
) -> None:
    streaming, store = killed_while_closing(tmp_path, monkeypatch, 7)
    lost = rows_of(store)
    without_catalog(store)
    if not with_log:
        (store / CATALOG_LOG).unlink()
    assert made_again(store)[0].missing == 0
    marks = [(row[0], row[5], row[8]) for row in lost["tails"]]  # number, last write, mark
    assert [(row[0], row[5], row[8]) for row in rows_of(store)["tails"]] == marks
    check_states(store, streaming.history, streaming.readable, step=2)
    with closing(Ingest(str(tmp_path / "killed"), streaming.history.hello)) as ingest:
        assert ingest.welcome().mark == streaming.history.mark
        assert ingest.welcome().end == streaming.end
    check_states(store, streaming.history, streaming.readable, step=2)
    with closing(Store.open(str(store))) as opened:
        assert (opened.bookmark("middle") is not None) == with_log


def test_an_interval_in_the_middle_of_its_commit_is_settled_as_without_a_rebuild(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before each step of a closing's commit: with the catalog, or one made again, all is there."""
    for number, where in enumerate(("publish", "commit", "unlink")):
        root = tmp_path / str(number)
        streaming = Streaming(root, random_history(11))
        streaming.write(20)
        streaming.stream(20)
        streaming.clock.now_s += 1
        streaming.flush()
        history, last_seq = streaming.history, streaming.end[0]
        history.reachable |= set(range(last_seq + 1))

        def kill(*arguments: Any) -> None:
            raise Killed

        with monkeypatch.context() as patch:
            if where == "unlink":
                patch.setattr(os, "unlink", kill)
            elif where == "commit":
                patch.setattr(Catalog, "commit", kill)
            else:
                patch.setattr(os, "rename", killing(os.rename, iter(range(99)), 2))
            with pytest.raises(Killed):
                streaming.mark("here")
                streaming.ingest.stream.wait_for_closing()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Stream, "close", lambda self: None)
            patch.setattr(LoggedDatabase, "_write_log", lambda self, durable: None)  # of the dead nothing runs
            with suppress(Killed):
                streaming.close()
        store = root / "db1"
        for log in (True, False):
            work = tmp_path / f"{number}-{log}"
            shutil.copytree(root, work)
            without_catalog(work / "db1")
            if not log:
                (work / "db1" / CATALOG_LOG).unlink()
            assert made_again(work / "db1")[0].missing == 0
            check_states(work / "db1", history, last_seq, step=3)
            with closing(Ingest(str(work), history.hello)) as ingest:
                assert (ingest.welcome().end, ingest.welcome().mark) == (history.at, history.mark) or not log
            check_states(work / "db1", history, last_seq, step=3)
        assert store.exists()


def small_store(root: Path) -> tuple[History, Path]:
    history = History(5, (VolumeInfo("a", 9_000, 1024),))
    with closing(Ingest(str(root), history.hello, FakeClock())) as ingest:
        ingest_transfer(ingest, history.close_interval())
        for number in range(4):
            for _ in range(6):
                history.write()
            ingest_transfer(ingest, history.close_interval((0, None)[number % 2], bookmarks=(f"b{number}",)))
        ingest.write(batch_of([history.write() for _ in range(5)]))
        ingest.mark(mark_of(history, "streamed"))
        ingest.stream.wait_for_closing()
        for _ in range(2):
            ingest.write(batch_of([history.write() for _ in range(2)]))
            ingest.flush(history.times_ns[-1])
        history.reachable |= set(range(history.at[0], len(history.states)))
    return history, root / "db1"


def killing(real: Callable[..., Any], calls: Iterator[int], last: int) -> Callable[..., Any]:
    """Does what `real` does, but for the last of all calls and those after it."""

    def call(*arguments: Any, **options: Any) -> Any:
        if next(calls) >= last:
            raise Killed
        return real(*arguments, **options)

    return call


def test_killed_anywhere_it_can_be_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, store = small_store(tmp_path / "source")
    lost, number, is_done = rows_of(store), 0, False
    while not is_done:
        work = tmp_path / "work"
        shutil.copytree(store, work)
        if number % 2:
            without_catalog(work)
        calls = iter(range(10_000))
        with monkeypatch.context() as patch:
            for name in ("rename", "unlink", "link", "fsync", "pwrite", "ftruncate", "open"):
                patch.setattr(os, name, killing(getattr(os, name), calls, number * 3))
            try:
                made_again(work)
                is_done = True
            except Killed:
                pass
        report, said = made_again(work)
        assert (said, report.missing) == ([], 0) and rows_of(work) == lost, number
        shutil.rmtree(work)
        number += 1
    assert number > 15


def test_however_the_log_is_cut_or_damaged_no_state_is_lost_and_damage_is_said(tmp_path: Path) -> None:
    history, store = small_store(tmp_path / "source")
    log = (store / CATALOG_LOG).read_bytes().rstrip(b"\0")
    without_catalog(store)
    (store / CATALOG_LOG).unlink()
    random = np.random.default_rng(3)
    for number in range(40):
        work = tmp_path / "work"
        shutil.copytree(store, work)
        at = int(random.integers(len(log)))
        damaged = bytearray(log)
        damaged[at] ^= 1 << int(random.integers(8))
        (work / CATALOG_LOG).write_bytes(log[:at] if number % 2 else damaged)
        report, said = made_again(work)
        assert (report.snapshots, report.intervals) == (6, 5)
        assert number % 2 or said or at >= len(log) - 600, "what is damaged, but the end, is noticed"
        check_states(work, history, len(history.states) - 1, step=7)
        shutil.rmtree(work)


def test_a_log_of_another_store_is_not_taken_for_its_own(tmp_path: Path) -> None:
    _, store = small_store(tmp_path / "a")
    other = Streaming(tmp_path / "b", random_history(9))
    other.close()
    shutil.copy(Path(other.ingest.path) / CATALOG_LOG, store / CATALOG_LOG)
    report, said = made_again(store)
    assert report.snapshots == 6 and "of another store" in said[0]


def test_what_cannot_be_got_back_is_named(tmp_path: Path) -> None:
    history, store = small_store(tmp_path)
    lost = rows_of(store)
    for path in object_files(store, "snapshot-*3.map"):
        path.unlink()
    (store / CATALOG_LOG).unlink()
    report, said = made_again(store)
    assert report.missing == 2 and report.snapshots == len(lost["snapshots"]) - 1
    assert any(line.startswith("no instant between 2025-") for line in said)
    with closing(Store.open(str(store))) as opened:
        for seq in range(len(history.states)):
            found = opened.at_seq(seq)
            assert read_image(opened, found, 0) == history.states[found.seq][0]
    Ingest(str(tmp_path), history.hello).close()


def test_a_catalog_older_than_its_log_is_not_written(tmp_path: Path) -> None:
    history, store = small_store(tmp_path)
    shutil.copy(store / CATALOG, tmp_path / "older")
    with closing(Ingest(str(tmp_path), history.hello)) as ingest:
        ingest.mark(mark_of(history, "one"))
        ingest.stream.wait_for_closing()
        ingest.mark(mark_of(history, "two"))
    lost = rows_of(store)
    shutil.copy(tmp_path / "older", store / CATALOG)
    with pytest.raises(StoreError, match=r"older than its log.*--rebuild"):
        Ingest(str(tmp_path), history.hello)
    report = check(str(store), False, lambda count: None)
    assert "older than its log: make it again" in report.problem
    assert [each.kind for each, _ in report.damaged] == ["catalog"]
    assert made_again(store)[0].missing == 0
    assert check(str(store), False, lambda count: None).damaged == []
    assert rows_of(store) == lost


@pytest.mark.parametrize("renewed_by", ["rebuild", "size"])
def test_a_catalog_older_than_a_log_that_was_begun_since_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renewed_by: str
) -> None:
    history, store = small_store(tmp_path)
    shutil.copy(store / CATALOG, tmp_path / "older")
    if renewed_by == "rebuild":
        made_again(store)
    else:
        monkeypatch.setattr("pitfs.store.catalog.log.RENEWED_BEYOND_BYTES", -(1 << 40))
    with closing(Ingest(str(tmp_path), history.hello)) as ingest:
        ingest.mark(mark_of(history, "one"))
        ingest.stream.wait_for_closing()
        ingest.mark(mark_of(history, "two"))
    lost, log = rows_of(store), (store / CATALOG_LOG).read_bytes()
    shutil.copy(tmp_path / "older", store / CATALOG)
    with pytest.raises(StoreError, match=r"older than its log.*--rebuild"):
        Ingest(str(tmp_path), history.hello)
    assert (store / CATALOG_LOG).read_bytes() == log
    assert made_again(store)[0].missing == 0
    assert rows_of(store) == lost
    Ingest(str(tmp_path), history.hello).close()


@pytest.mark.parametrize("seed", range(60, 66))
def test_after_pruning_the_catalog_made_again_has_what_was_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(pruner_module, "sync_file_system", lambda path: None)
    model, random = model_of(tmp_path, seed, count=9), np.random.default_rng(seed)
    for _ in range(3):
        actions = list(itertools.chain(*actions_for(model, random)))
        with Pruner(model.path) as pruner:
            model.take(actions)
            pruner.apply(actions)
        lost = rows_of(Path(model.path))
        without_catalog(Path(model.path))
        report, said = made_again(Path(model.path))
        assert (said, report.missing) == ([], 0)
        # That a removal is finished is committed, but not durably: it is finished once more, as after a power loss.
        with Pruner(model.path):
            pass
        assert rows_of(Path(model.path)) == lost
        model.check()
        assert_tidy(model.path)
        with closing(Ingest(str(model.root), model.history.hello)) as ingest:
            model.receive(ingest, 2)
    model.check()


def test_who_has_the_old_catalog_open_changes_nothing_any_more(tmp_path: Path) -> None:
    _, store = small_store(tmp_path)
    old, reader = Catalog(str(store / CATALOG), "write"), Store.open(str(store))
    made_again(store)
    made = (store / CATALOG_LOG).read_bytes()
    with pytest.raises(StoreError, match="made again meanwhile"), old.changes():
        old.delete("bookmarks", "name", "b1")
    assert (store / CATALOG_LOG).read_bytes() == made
    with closing(Catalog(str(store / CATALOG), "write")) as new:
        new.fence(8, 8)
        assert len(list(reader.snapshots())) == 6
        old.close()
        reader.close()  # SQLite removes nothing of what has their names now
        new.fence(9, 9)
        with closing(Catalog(str(store / CATALOG))) as another:
            assert another.meta("epoch") == 9 and another.bookmark("b1") is not None
            assert another.rows("PRAGMA integrity_check") == [("ok",)]


def test_commits_that_a_power_loss_undid_are_written_over(tmp_path: Path) -> None:
    _, store = small_store(tmp_path)
    path, before = str(store / CATALOG), (store / CATALOG).read_bytes()
    catalog = Catalog(path, "write")
    for number in range(3):
        with catalog.changes(durable=False):
            catalog.put("bookmarks", (f"undone-{number}", 1, 2))
    assert "undone-2" in str(logged(catalog)), "in the order of commits, though they aren't durable"
    catalog._is_log_outdated = True  # as if it were killed: it writes nothing when it is closed
    catalog.close()
    without_catalog(store)
    (store / CATALOG).write_bytes(before)
    with closing(Catalog(path, "write")) as again:
        put_bookmark(again, "done")
        assert "undone" not in str(logged(again)) and "done" in str(logged(again))


def test_a_log_that_was_deleted_begins_anew_with_the_next_commit(tmp_path: Path, catalog: Catalog) -> None:
    put_bookmark(catalog, "first")
    (tmp_path / CATALOG_LOG).unlink()
    put_bookmark(catalog, "second")
    assert "first" in str(logged(catalog)) and "second" in str(logged(catalog))


def test_where_a_log_of_streamed_writes_is_lost_or_damaged_the_rest_comes_back(tmp_path: Path) -> None:
    history, store = small_store(tmp_path / "source")
    (number,) = [row[0] for row in rows_of(store)["tails"]]
    for name, damage in (("empty", 4096), ("gone", None), ("damaged", 4100)):
        work = tmp_path / name
        shutil.copytree(store.parent, work)
        without_catalog(work / "db1")
        (wal,) = object_files(work / "db1", f"journal-{number:016x}.blocks")
        if damage is None:
            wal.unlink()
        elif name == "empty":
            os.truncate(wal, damage)
        else:
            data = bytearray(wal.read_bytes())
            data[damage] ^= 1
            wal.write_bytes(data)
        report, said = made_again(work / "db1")
        assert report.snapshots == 6 and report.missing == (name != "empty"), said
        check_states(work / "db1", history, 29, step=4)
        if name == "damaged":
            with pytest.raises(CorruptionError, match="writes that were acknowledged"):
                Ingest(str(work), history.hello)
        else:
            Ingest(str(work), history.hello).close()


# -- the log -----------------------------------------------------------------------------------------------------


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    with closing(Catalog(str(tmp_path / CATALOG), "make")) as made:
        yield made


def logged(catalog: Catalog) -> list[Any]:
    with closing(CatalogLog.open(os.path.join(os.path.dirname(catalog.path), CATALOG_LOG))) as log:
        return list(log.records(HEADER_BYTES))


def put_bookmark(catalog: Catalog, name: str) -> None:
    with catalog.changes():
        catalog.put("bookmarks", (name, 1, 2))


def test_what_is_not_committed_is_not_in_the_log_or_is_written_over(catalog: Catalog) -> None:
    put_bookmark(catalog, "first")
    before = logged(catalog)
    with pytest.raises(ZeroDivisionError), catalog.changes():
        catalog.put("bookmarks", ("undone", 1, 2))
        raise ZeroDivisionError
    assert logged(catalog) == before
    catalog._db.set_commit_hook(lambda: True)
    with pytest.raises(Exception, match="constraint"):
        put_bookmark(catalog, "failed")
    catalog._db.set_commit_hook(None)
    assert "failed" in str(logged(catalog)) and catalog.bookmark("failed") is None
    put_bookmark(catalog, "second")
    assert "failed" not in str(logged(catalog)) and "second" in str(logged(catalog))
    catalog.fence(3, 4)
    assert "epoch" in str(logged(catalog)[-1])
    with catalog.changes(durable=False):
        catalog._put_meta("protected_through_ns", 77)
    assert "77" not in str(logged(catalog))
    put_bookmark(catalog, "third")
    assert "77" in str(logged(catalog)), "what of meta wasn't durable comes with the next that is"


def test_processes_append_in_turns_and_the_log_stays_bounded(tmp_path: Path, catalog: Catalog) -> None:
    put_bookmark(catalog, "first")
    with closing(Catalog(catalog.path, "write")) as other:
        for number in range(3000):
            each = (catalog, other)[number % 2]
            with each.changes():
                each.delete("bookmarks", "name", "kept")
                each.put("bookmarks", ("kept", number, number))
                each.put("digests", (number % 5, number, number, number))
                each.delete_range("digests", "snapshot", 0, 4)
    size = os.path.getsize(tmp_path / CATALOG_LOG)
    assert size < 300_000
    again = Catalog(str(tmp_path / "again.sqlite"), "make")
    with again.changes():
        for changes in logged(catalog):
            again.replay(changes)
    for table in ("bookmarks", "digests"):
        assert again.rows(f"SELECT * FROM {table}") == catalog.rows(f"SELECT * FROM {table}")
    again.close()


def test_what_an_older_version_did_without_the_log_comes_to_it_when_this_one_opens_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history, store = small_store(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(LoggedDatabase, "_write_log", lambda self, durable: None)
        with closing(Ingest(str(tmp_path), history.hello)) as ingest:
            ingest.mark(mark_of(history, "older"))
            ingest.stream.wait_for_closing()
            ingest.mark(mark_of(history, "without-writes"))
    with closing(Ingest(str(tmp_path), history.hello)) as ingest:
        ingest.mark(mark_of(history))  # with the first that is committed
    lost = rows_of(store)
    without_catalog(store)
    assert made_again(store)[0].missing == 0
    assert rows_of(store) == lost


def test_the_log_has_the_golden_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what zlib makes of a body, which may be another with each version of it."""
    golden = bytes.fromhex((Path(__file__).parents[1] / "golden" / "catalog-log.hex").read_text("ascii"))
    base, later = ("bookmarks", [["first", 1, 2, -3]]), [("meta", [["mark", 7, 8]]), ("objects", "name", "a", "a")]
    kept = tmp_path / "kept"
    kept.write_bytes(golden)
    with closing(CatalogLog.open(str(kept))) as log:
        changes = [[list(base)], [list(each) for each in later]]
        assert list(log.records(HEADER_BYTES)) == changes and log.end == len(golden)
        assert next(iter(log.records(log.base_end))) == changes[1]
        number = log.number
    monkeypatch.setattr(log_module, "randbits", lambda count: number)
    monkeypatch.setattr(log_module.zlib, "compress", lambda data, level: bodies[data])
    bodies: dict[bytes, bytes] = {}
    with closing(CatalogLog.open(str(kept))) as log:
        for offset in (HEADER_BYTES, log.base_end):
            body = log._body(offset)
            assert body is not None
            bodies[zlib.decompress(body)] = body
    with closing(CatalogLog.create(str(tmp_path / CATALOG_LOG), bytes(range(16)), [base])) as log:
        log.append(log.end, later)
    assert (tmp_path / CATALOG_LOG).read_bytes().rstrip(b"\0") == golden


def test_damage_before_records_that_are_whole_is_told_from_a_torn_end(tmp_path: Path, catalog: Catalog) -> None:
    for name in ("a", "b", "c"):
        put_bookmark(catalog, name)
    path = tmp_path / CATALOG_LOG
    whole, data = logged(catalog), path.read_bytes().rstrip(b"\0")
    for cut in range(len(data) - 1, HEADER_BYTES, -1):
        os.truncate(path, cut)
        assert logged(catalog) == whole[: len(logged(catalog))] and len(logged(catalog)) < len(whole)
    path.write_bytes(data)
    with open(path, "r+b") as file:
        file.seek(HEADER_BYTES + 40)
        file.write(b"\xff\x00")
    with pytest.raises(CorruptionError, match="aren't what was written"):
        logged(catalog)
    with closing(CatalogLog.open(str(path))) as log:
        bounds: list[tuple[int, int]] = []
        assert list(log.records(HEADER_BYTES, lambda *found: bounds.append(found))) == whole[1:]
        assert len(bounds) == 1 and bounds[0][0] == HEADER_BYTES
