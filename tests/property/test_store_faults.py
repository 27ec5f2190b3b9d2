"""A store that was cut off, ran out of room, or was damaged: nothing lost, nothing wrong, nothing half."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pitfs.errors import CapacityError, CorruptionError, PitfsError, StoreError
from pitfs.model.transfer import Begin, End, TransferKind, VolumeInfo
from pitfs.store import opening
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.catalog.records import Commit
from pitfs.store.ingest import Ingest
from pitfs.store.objects.format import CATALOG, CATALOG_LOG, STORE_JSON, VERSION_1, Layout
from pitfs.store.store import Store
from pitfs.store.transfer.recovery import MAX_PARKED
from tests.helpers.stores import feed, ingest_transfer, object_files, read_image
from tests.helpers.streams import batch_of, mark_of
from tests.helpers.transfers import History, Transfer

CALLS = ("pwrite", "fsync", "fdatasync", "rename", "unlink", "ftruncate", "open")


class Killed(BaseException):
    """The process is dead: nothing of it runs after this."""


@pytest.fixture(autouse=True)
def disk_that_needs_no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here loses power: that the syncs are asked for, and when, is counted."""
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd: None)


def small_history() -> tuple[History, list[Transfer]]:
    """Two committed marks and one to come, with a journal; few blocks."""
    history = History(5, (VolumeInfo("a", 9_000, 1024), VolumeInfo("b", 5_000, 512)))
    transfers = [history.close_interval()]
    for _ in range(2):
        for _ in range(8):
            history.write()
        marks = (f"mark-{len(transfers)}",)
        transfers.append(history.close_interval(bookmarks=marks, before_ns=(50_000_000,)))
    assert all(len(transfer.layers) == 2 for transfer in transfers[1:])
    return history, transfers


@contextmanager
def failing(
    monkeypatch: pytest.MonkeyPatch, number: int, error: Callable[[], BaseException]
) -> Iterator[list[str]]:
    """Call `number` (from 0) of those that change the disk raises; if it kills, all after it do as well.

    A commit counts twice: when it begins, and when it is done.
    """
    seen: list[str] = []

    def note(name: str) -> None:
        seen.append(name)
        raised = error()
        if len(seen) - 1 == number or (len(seen) > number >= 0 and isinstance(raised, Killed)):
            raise raised

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            note(name)
            result = real(*arguments, **options)
            if name == "commit":
                note("committed")
            return result

        return call

    with monkeypatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, wrap(name, getattr(os, name)))
        patch.setattr(Catalog, "commit", wrap("commit", Catalog.commit))
        patch.setattr(Catalog, "commit_layers", wrap("commit", Catalog.commit_layers))
        yield seen


def send(ingest: Ingest, transfer: Transfer) -> None:
    random = np.random.default_rng(1)
    lengths = ingest.begin(transfer.manifest).lengths
    for frame in transfer.frames(random, lengths):
        if isinstance(frame, End):
            ingest.checkpoint(tuple(frame.lengths))
        if not isinstance(frame, Begin):
            feed(ingest, frame)


def assert_all_readable(path: str, history: History, up_to_seq: int) -> None:
    """All that is listed is there and right, and it is listed up to that seq."""
    store = Store.open(path)
    listed = [snapshot.seq for snapshot in store.snapshots()]
    assert listed[-1] == up_to_seq
    for interval in store.intervals():
        listed += range(interval.from_seq + 1, interval.to_seq + 1)
    for seq in set(listed):
        found = store.at_seq(seq)
        for volume in range(len(history.volumes)):
            assert read_image(store, found, volume) == history.states[found.seq][volume]
    for bookmark in store.bookmarks():
        assert store.at_instant(bookmark.time_ns) is not None
    store.close()


PARTS = ("diff", "first layers", "more layers")


@pytest.fixture(params=[*PARTS, "more layers of long ago", *(f"{part} of version 1" for part in PARTS)])
def before(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> tuple[History, Transfer, str]:
    """A store with all transfers but the last, which is given with it: a diff, or layers of the last interval.

    Of long ago: the ids that come next are in another folder. Of version 1: as an earlier pitfs made it.
    """
    history, transfers = small_history()
    last = transfers.pop()
    parts = [last, *last.layers]
    last.layers = []
    part, _, which = request.param.partition(" of ")
    with monkeypatch.context() as patch:
        if which == "version 1":
            patch.setattr(opening, "VERSION", 1)
            patch.setattr(Layout, "of", lambda volumes: VERSION_1)
        ingest = Ingest(str(tmp_path / "before"), history.hello)
        for transfer in (*transfers, *parts[: PARTS.index(part)]):
            ingest_transfer(ingest, transfer)
        ingest.close()
    if which == "long ago":
        give_ids(ingest.path, 5000)
    return history, parts[PARTS.index(part)], str(tmp_path / "before")


def give_ids(store: str, next_id: int) -> None:
    """As if all ids before that one had been given."""
    catalog = Catalog(os.path.join(store, CATALOG), "write")
    with catalog.changes():
        catalog.delete("meta", "key", "next_snapshot")
        catalog.put("meta", ("next_snapshot", next_id))
    catalog.close()


def assert_no_orphans(store: str) -> None:
    """Each object in objects/ is one that the catalog has."""
    catalog = Catalog(os.path.join(store, CATALOG))
    assert catalog.unknown_objects([path.name for path in object_files(store)]) == []
    catalog.close()


def position_of(ingest: Ingest) -> tuple[int, int, int]:
    """The last mark, and how fine the last interval is."""
    welcome = ingest.welcome()
    coarse = [each.granularity_ns for each in welcome.coarse if each.to_seq == welcome.seq]
    return welcome.mark, welcome.seq, (0 if not coarse else -1 if coarse[0] is None else coarse[0])


def position_with(transfer: Transfer, committed: bool) -> tuple[int, int, int]:
    """What `position_of` must be with that transfer, or before it."""
    m = transfer.manifest
    if m.kind is TransferKind.INTERVAL:
        return (m.mark, m.to_seq, -1) if committed else (m.mark - 1, m.from_seq, 0)
    granularity_ns = m.granularity_ns if committed else m.base_granularity_ns
    return m.mark, m.to_seq, -1 if granularity_ns is None else granularity_ns


def storage_calls(
    monkeypatch: pytest.MonkeyPatch, before: tuple[History, Transfer, str], work: str
) -> list[str]:
    history, transfer, source = before
    shutil.copytree(source, work)
    ingest = Ingest(work, history.hello)
    with failing(monkeypatch, -1, Killed) as seen:
        send(ingest, transfer)
    ingest.close()
    shutil.rmtree(work)
    return seen


def test_killed_at_any_step_the_store_opens_and_takes_the_transfer_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: tuple[History, Transfer, str]
) -> None:
    history, transfer, source = before
    work = str(tmp_path / "work")
    calls = storage_calls(monkeypatch, before, work)
    assert {"rename", "fsync", "fdatasync", "commit", "unlink"} <= set(calls)
    m = transfer.manifest
    for number, name in enumerate(calls):
        shutil.copytree(source, work)
        ingest = Ingest(work, history.hello)
        with failing(monkeypatch, number, Killed), pytest.raises(Killed):
            send(ingest, transfer)
        ingest.close()
        committed = "committed" in calls[: number + 1]
        wanted = position_with(transfer, committed)
        assert_all_readable(os.path.join(work, "db1"), history, wanted[1])
        ingest = Ingest(work, history.hello)
        assert position_of(ingest) == wanted, name
        if not committed:
            send(ingest, transfer)
        assert_all_readable(os.path.join(work, "db1"), history, m.to_seq)
        assert_no_orphans(ingest.path)
        assert os.listdir(os.path.join(work, "db1", "staging")) == [] or committed
        ingest.close()
        shutil.rmtree(work)


def test_where_the_disk_is_full_the_transfer_resumes_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: tuple[History, Transfer, str]
) -> None:
    history, transfer, source = before
    work = str(tmp_path / "work")
    calls = storage_calls(monkeypatch, before, work)
    last_checkpoint = max(n for n, name in enumerate(calls[: calls.index("commit")]) if name == "fdatasync") + 5
    assert "rename" in calls[last_checkpoint + 1 :], "the moves to objects/ come after it"
    for number in [n for n, name in enumerate(calls) if name not in ("commit", "committed", "unlink")]:
        shutil.copytree(source, work)
        ingest = Ingest(work, history.hello)
        with (
            failing(monkeypatch, number, lambda: OSError(errno.ENOSPC, "full")),
            pytest.raises(CapacityError, match="make room"),
        ):
            send(ingest, transfer)
        if number > last_checkpoint:
            assert ingest.begin(transfer.manifest).cursor, "the checkpoint is kept"
        send(ingest, transfer)
        assert_all_readable(ingest.path, history, transfer.manifest.to_seq)
        ingest.close()
        shutil.rmtree(work)


def test_where_the_commit_fails_what_was_sent_is_kept(
    monkeypatch: pytest.MonkeyPatch, before: tuple[History, Transfer, str]
) -> None:
    history, transfer, root = before

    def full(*_: object) -> None:
        raise CapacityError("catalog: no room")

    ingest = Ingest(root, history.hello)
    with monkeypatch.context() as patch:
        patch.setattr(Catalog, "commit", full)
        patch.setattr(Catalog, "commit_layers", full)
        with pytest.raises(CapacityError):
            send(ingest, transfer)
    assert ingest.begin(transfer.manifest).lengths == transfer.end.lengths
    ingest.end(transfer.end)
    assert_all_readable(ingest.path, history, transfer.manifest.to_seq)
    ingest.close()


def test_every_damaged_byte_is_noticed_or_harmless(tmp_path: Path) -> None:
    history, transfers = small_history()
    ingest = Ingest(str(tmp_path), history.hello)
    for transfer in transfers:
        ingest_transfer(ingest, transfer)
    ingest.close()
    wrong, noticed = 0, 0
    random = np.random.default_rng(2)
    for file in object_files(ingest.path):
        good = file.read_bytes()
        offsets = [*range(0, 72, 5), *random.integers(4096, len(good), 20).tolist(), len(good) - 1]
        for offset in offsets:
            damaged = bytearray(good)
            damaged[offset] ^= 1 << int(random.integers(8))
            file.write_bytes(damaged)
            for seq in (5, 15):
                store = Store.open(ingest.path)
                try:
                    for volume in range(2):
                        wrong += read_image(store, store.at_seq(seq), volume) != history.states[seq][volume]
                except PitfsError:  # CorruptionError, or StoreVersionError from a header
                    noticed += 1
                finally:
                    store.close()
        file.write_bytes(good)
    assert wrong == 0
    assert noticed > 80


def test_objects_that_were_swapped_or_are_missing_are_noticed(tmp_path: Path) -> None:
    history, transfers = small_history()
    ingest = Ingest(str(tmp_path), history.hello)
    for transfer in transfers:
        ingest_transfer(ingest, transfer)
    ingest.close()
    first, second = object_files(ingest.path, "journal-*[23].blocks")
    second.write_bytes(first.read_bytes())
    for seq, problem in ((history.at[0] - 1, "another object"), (history.at[0] - 2, "missing")):
        store = Store.open(ingest.path)
        with pytest.raises(CorruptionError, match=problem):
            [read_image(store, store.at_seq(seq), volume) for volume in range(2)]
        store.close()
        second.unlink(missing_ok=True)


def test_a_staged_row_that_changed_on_disk_makes_the_transfer_begin_anew(
    before: tuple[History, Transfer, str],
) -> None:
    history, transfer, root = before
    ingest = Ingest(root, history.hello)
    for frame in list(transfer.frames(np.random.default_rng(0)))[:-1]:
        feed(ingest, frame)
    ingest.checkpoint((1,))
    ingest.close()
    name = "diff.rows" if transfer.manifest.kind is TransferKind.INTERVAL else "journal.rows"
    (rows,) = (path for path in Path(ingest.path, "staging").rglob(name) if path.stat().st_size)
    data = bytearray(rows.read_bytes())
    data[0] ^= 1  # the block's number: contents and checksums would still agree
    rows.write_bytes(data)
    ingest = Ingest(root, history.hello)
    assert ingest.begin(transfer.manifest).lengths == (0, 0, 0, 0, 0)
    send(ingest, transfer)
    assert_all_readable(ingest.path, history, transfer.manifest.to_seq)
    ingest.close()


def test_a_damaged_catalog_or_store_json_is_one_clear_error(before: tuple[History, Transfer, str]) -> None:
    path = Path(before[2], "db1")
    good = (path / CATALOG).read_bytes()
    for part in (CATALOG, STORE_JSON):
        (path / part).write_bytes(b"nothing that anybody could read" * 200)
        with pytest.raises(PitfsError, match=part.replace(".", r"\.")):
            Store.open(str(path)).latest()
        (path / CATALOG).write_bytes(good)


def test_each_file_is_durable_before_its_name_and_both_before_the_commit(
    monkeypatch: pytest.MonkeyPatch, before: tuple[History, Transfer, str]
) -> None:
    history, transfer, root = before
    ingest = Ingest(root, history.hello)
    events: list[tuple[str, str]] = []
    rename, commit, commit_layers = os.rename, Catalog.commit, Catalog.commit_layers

    def note_rename(source: str, target: str) -> None:
        events.append(("rename", os.path.basename(target)))
        rename(source, target)

    def note_commit(catalog: Catalog, added: Commit) -> None:
        events.append(("commit", ""))
        commit(catalog, added)

    def note_commit_layers(catalog: Catalog, *added: Any) -> None:
        events.append(("commit", ""))
        commit_layers(catalog, *added)

    monkeypatch.setattr(
        os, "fsync", lambda fd: events.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))))
    )
    monkeypatch.setattr(os, "rename", note_rename)
    monkeypatch.setattr(Catalog, "commit", note_commit)
    monkeypatch.setattr(Catalog, "commit_layers", note_commit_layers)
    send(ingest, transfer)
    ingest.close()
    committed = events.index(("commit", ""))
    objects = [event for event in events[:committed] if event[0] == "rename" and "-" in event[1]]
    first = transfer.manifest.base_granularity_ns is None
    assert len(objects) == (2 if first else 1)
    if not first:  # contents go behind those that are there
        index = [event for event in objects if event[1].endswith(".index")]
        blocks = ("fsync", f"journal-{3:016x}.blocks")
        assert objects == index and blocks in events[: events.index(index[0])]
    for event in objects:
        assert ("fsync", event[1]) in events[: events.index(event)]
    after_the_last = events[events.index(objects[-1]) : committed]
    staging = "staging" if transfer.manifest.kind is TransferKind.INTERVAL else f"layers-{3:016x}"
    is_flat = (Path(ingest.path) / "objects" / f"snapshot-{1:016x}.map").exists()
    assert {("fsync", "objects" if is_flat else "000"), ("fsync", staging)} <= set(after_the_last)


# A catalog that isn't the one that was written


def store_of(tmp: Path, count: int = 3) -> tuple[History, Path]:
    """A store with the first marks of the small history."""
    history, transfers = small_history()
    ingest = Ingest(str(tmp), history.hello)
    for transfer in transfers[:count]:
        for part in (transfer, *transfer.layers):
            send(ingest, part)
    ingest.close()
    return history, Path(ingest.path)


def test_a_flipped_bit_in_the_catalog_never_gives_another_state(tmp_path: Path) -> None:
    history, path = store_of(tmp_path)
    whole = (path / CATALOG).read_bytes()
    random = np.random.default_rng(3)
    used = np.flatnonzero(np.frombuffer(whole, np.uint8))
    last_seq = len(history.states) - 1
    refused = 0
    for place in random.choice(used, 700, replace=False).tolist():
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(random.integers(8))
        (path / CATALOG).write_bytes(damaged)
        seq = int(random.integers(last_seq + 1))
        try:
            store = Store.open(str(path))
        except PitfsError:
            refused += 1
            continue
        try:
            by_seq = store.at_seq(seq)
            by_time, _ = store.at_time(history.times_ns[seq])
            for found in (by_seq, by_time):
                assert found.seq == seq
                for volume, content in enumerate(history.states[seq]):
                    assert read_image(store, found, volume) == content
        except PitfsError:
            refused += 1
        finally:
            store.close()
    assert 50 < refused < 650, "some of it matters, some doesn't"


def test_objects_that_the_catalog_does_not_know_are_never_removed(tmp_path: Path) -> None:
    """An older copy of the catalog put back, or one cut to nothing: `receive` must not sweep the history away."""
    history, path = store_of(tmp_path / "a")
    objects = object_files(path)
    newest = (path / CATALOG).read_bytes()
    _, older = store_of(tmp_path / "b", 2)
    (path / CATALOG).write_bytes((older / CATALOG).read_bytes())
    with pytest.raises(StoreError, match="older than its log"):
        Ingest(str(tmp_path / "a"), history.hello)
    (path / CATALOG_LOG).rename(tmp_path / CATALOG_LOG)
    with pytest.raises(StoreError, match="older than the objects"):
        Ingest(str(tmp_path / "a"), history.hello)
    (tmp_path / CATALOG_LOG).rename(path / CATALOG_LOG)
    (path / CATALOG).write_bytes(b"")
    with pytest.raises(StoreError, match="no catalog of a store"):
        Ingest(str(tmp_path / "a"), history.hello)
    (path / CATALOG).write_bytes(newest)
    store_json = (path / STORE_JSON).read_bytes()
    (path / STORE_JSON).unlink()
    with pytest.raises(StoreError, match=r"no store\.json: put that back"):
        Ingest(str(tmp_path / "a"), history.hello)
    (path / STORE_JSON).write_bytes(store_json)
    assert object_files(path) == objects
    Ingest(str(tmp_path / "a"), history.hello).close()



# What the catalog doesn't know is found without a look at all that it knows


def test_a_folder_is_durable_before_the_catalog_counts_on_what_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each folder's entry in the one above it, also where a kill came between its making and its sync."""
    history, transfers = small_history()
    ingest = Ingest(str(tmp_path), history.hello)
    ingest_transfer(ingest, transfers[0])
    ingest.close()
    give_ids(ingest.path, 1 << 20)
    objects, events, commit = Path(ingest.path, "objects"), list[str](), Catalog.commit

    def note_fsync(fd: int) -> None:
        events.append(os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), objects))

    def note_commit(catalog: Catalog, added: Commit) -> None:
        events.append("commit")
        commit(catalog, added)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Catalog, "commit", note_commit)
    for is_there in (False, True):
        assert (objects / "0001" / "000").is_dir() == is_there
        events.clear()
        ingest = Ingest(str(tmp_path), history.hello)
        send(ingest, transfers[1 + is_there])
        ingest.close()
        before = events[: events.index("commit")]
        assert {".", "0001", "0001/000"} <= set(before)
        assert before.index(".") < before.index("0001/000") > before.index("0001")


def test_layers_that_were_given_up_leave_nothing_that_stops_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their commit failed, and so many others were put off since that they had to go."""
    history = History(5, (VolumeInfo("a", 9_000, 1024), VolumeInfo("b", 5_000, 512)))
    ingest = Ingest(str(tmp_path), history.hello)
    ingest_transfer(ingest, history.close_interval())
    waiting = []
    for _ in range(MAX_PARKED + 1):
        for _ in range(4):
            history.write()
        transfer = history.close_interval()
        waiting += transfer.layers
        transfer.layers = []
        ingest_transfer(ingest, transfer)
    with monkeypatch.context() as patch:

        def full(*_: object) -> None:
            raise CapacityError("catalog: no room")

        patch.setattr(Catalog, "commit_layers", full)
        with pytest.raises(CapacityError):
            send(ingest, waiting[0])
    for layers in waiting[1:]:
        ingest.begin(layers.manifest)
        ingest.park(())
    ingest.close()
    Ingest(str(tmp_path), history.hello).close()
    assert_no_orphans(ingest.path)


def test_a_file_that_comes_back_after_a_power_loss_is_removed(tmp_path: Path) -> None:
    """The log of an interval that became a snapshot, in a folder that isn't the newest."""
    history, transfers = small_history()
    ingest = Ingest(str(tmp_path), history.hello)
    ingest_transfer(ingest, transfers[0])
    ingest.close()
    give_ids(ingest.path, 255)
    ingest = Ingest(str(tmp_path), history.hello)
    history = History(5, history.volumes)
    history.close_interval()
    ingest.write(batch_of([history.write() for _ in range(3)]))
    log = next(path for path in object_files(ingest.path, "journal-*.blocks"))
    content = log.read_bytes()
    ingest.mark(mark_of(history))
    ingest.stream.wait_for_closing()
    ingest.close()
    assert not log.exists() and log.parent.name == "000"
    assert {path.parent.name for path in object_files(ingest.path)} == {"000", "001"}
    log.write_bytes(content)
    Ingest(str(tmp_path), history.hello).close()
    assert_no_orphans(ingest.path)


@pytest.mark.parametrize("version", [1, 2])
def test_an_older_catalog_is_noticed_in_a_store_of_each_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    if version == 1:
        monkeypatch.setattr(opening, "VERSION", 1)
        monkeypatch.setattr(Layout, "of", lambda volumes: VERSION_1)
    history, path = store_of(tmp_path / "a")
    _, older = store_of(tmp_path / "b", 2)
    (path / CATALOG).write_bytes((older / CATALOG).read_bytes())
    objects = object_files(path)
    with pytest.raises(StoreError, match="older than its log"):
        Ingest(str(tmp_path / "a"), history.hello)
    (path / CATALOG_LOG).unlink()
    with pytest.raises(StoreError, match="older than the objects"):
        Ingest(str(tmp_path / "a"), history.hello)
    assert object_files(path) == objects


def test_an_older_catalog_is_noticed_where_the_next_ids_have_no_objects_any_more(tmp_path: Path) -> None:
    """As a retention may leave it: what is newest tells, in whatever folder it is."""
    history, path = store_of(tmp_path)
    stray = path / "objects" / "0002" / "abc" / f"snapshot-{0x2ABC07:016x}.map"
    stray.parent.mkdir(parents=True)
    stray.write_bytes(bytes(4096))
    with pytest.raises(StoreError, match="older than the objects"):
        Ingest(str(tmp_path), history.hello)
    assert stray.exists()
