"""Snapshots that are removed leave all others byte for byte, and take with them what only they had."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pitfs.model.blockmap import NODE_BYTES
from pitfs.model.transfer import VolumeInfo
from pitfs.store import opening
from pitfs.store.catalog import database
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.index.maps import block_maps, node_loader
from pitfs.store.ingest import Ingest
from pitfs.store.objects.format import (
    CATALOG,
    HEADER_BYTES,
    OBJECTS,
    VERSION_1,
    Layout,
    ObjectKind,
    ObjectName,
)
from pitfs.store.objects.pool import ObjectPool
from pitfs.store.opening import changes_locked, read_store_info
from pitfs.store.retention import moving
from pitfs.store.retention import removal as removal_module
from pitfs.store.retention.removal import Removal
from pitfs.store.store import Store
from pitfs.store.transfer.writable_store import WritableStore
from pitfs.view.view import PointInTimeView, ReadBuffer, TableCache
from tests.helpers.histories import LongHistory
from tests.helpers.stores import ingest_transfer, object_files, read_image
from tests.helpers.streams import batch_of, mark_of
from tests.helpers.transfers import History, random_history

SECOND_NS = 1_000_000_000


@pytest.fixture(autouse=True)
def disk_that_needs_no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here loses power."""
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd: None)
    monkeypatch.setattr(database, "DURABLE", "OFF")
    monkeypatch.setattr(database, "NOT_DURABLE", "OFF")


@contextmanager
def an_earlier_pitfs() -> Iterator[None]:
    """Makes stores of version 1: units of 512 bytes, all objects in one folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "VERSION", 1)
        patch.setattr(Layout, "of", lambda volumes: VERSION_1)
        yield


def made(root: Path, history: History, count: int) -> str:
    """A store with so many intervals: shipped, with and without journals, streamed, and copied whole."""
    random = np.random.default_rng([history.seed, 13])
    ingest = Ingest(str(root), history.hello)
    ingest_transfer(ingest, history.close_interval())
    for _ in range(count):
        for _ in range(int(random.integers(1, 12))):
            history.write()
        choice = random.random()
        if choice < 0.5:
            ingest.write(batch_of(history.open))
            ingest.flush(history.open[-1].time_ns)
            ingest.mark(mark_of(history, f"mark-{history.open[-1].seq}"))
            ingest.stream.wait_for_closing()
        else:
            granularity_ns = (0, 50_000_000, None)[int(random.integers(3))]
            names = (f"mark-{history.open[-1].seq}",)
            ingest_transfer(ingest, history.close_interval(granularity_ns, names, full=choice > 0.9))
        if choice > 0.7:  # ids that others had: the next are in another folder
            ingest.close()
            with opened(ingest.path) as store, store.catalog.changes():
                next_id = store.catalog.next_snapshot_id()
                store.catalog.delete("meta", "key", "next_snapshot")
                store.catalog.put("meta", ("next_snapshot", next_id + 300))
            ingest = Ingest(str(root), history.hello)
    ingest.close()
    return ingest.path


@contextmanager
def opened(path: str) -> Iterator[WritableStore]:
    info = read_store_info(path)
    catalog = Catalog(os.path.join(path, CATALOG), "write")
    history = bytes.fromhex(info.history)
    objects = ObjectPool(os.path.join(path, OBJECTS), info.layout, history, host_of=catalog.host_of)
    yield WritableStore(catalog, objects, node_loader(objects), history, info.volumes)
    objects.close()
    catalog.close()


def remove(store: WritableStore, after_id: int | None, before_id: int) -> tuple[int, int]:
    """The bytes that were foretold, and freed."""
    removal = Removal(store, after_id, before_id)
    foretold = removal.foretell()
    removal.prepare()
    with store.catalog.changes():
        removal.change()
    return foretold, removal.free()


def allocated(path: str) -> int:
    return sum(os.stat(file).st_blocks * 512 for file in object_files(path))


def ids(path: str) -> list[int]:
    with opened(path) as store:
        return [snapshot.id for snapshot in store.catalog.snapshots()]


def live_units(store: WritableStore) -> tuple[set[int], set[int]]:
    """Pointers to all units of contents, and to all nodes, that any snapshot or difference journal has: naively."""
    contents, nodes = set[int](), set[int]()

    def walk(pointer: int, checksum: int, level: int, units: int) -> None:
        if pointer in nodes:
            return
        nodes.add(pointer)
        for entry, its in store.load_node(pointer, checksum).T.tolist():
            if entry and level:
                walk(entry, its, level - 1, units)
            elif entry:
                contents.update(range(entry, entry + units))

    for snapshot in store.catalog.snapshots():
        maps = block_maps(store.load_node, store.catalog.roots(snapshot.id), store.volumes)
        for each, units in zip(maps, store.block_units.tolist(), strict=True):
            depth = max(1, -(-(each.block_count - 1).bit_length() // 9))
            if each.root.pointer:
                walk(each.root.pointer, each.root.checksum, depth - 1, units)
    return contents, nodes


def assert_only_the_living_is_there(path: str) -> None:
    """Whatever else is in a file is zeros; each file is one that the catalog has."""
    with opened(path) as store:
        places: dict[tuple[str, int], int] = {}  # (file, byte) of each unit that is live, its size
        layout, hosts = store.layout, set[str]()
        for pointers, is_map in zip(live_units(store), (False, True), strict=True):
            for pointer in pointers:
                number, unit = layout.object_of(pointer), layout.unit_of(pointer)
                name = ObjectName(ObjectKind.MAP, number) if is_map else ObjectName.of_number(number)
                host, base = store.catalog.host_of(name) or (name, 0)
                unit_bytes = NODE_BYTES if is_map else layout.unit_bytes
                places[host.file, base + HEADER_BYTES + unit * unit_bytes] = unit_bytes
                hosts.add(host.file)
                assert store.catalog.object(name.file) is not None
        known = {name for (name,) in store.catalog.rows("SELECT name FROM objects EXCEPT SELECT name FROM moved")}
        assert {file.name for file in object_files(path)} == known
        for file in object_files(path, "snapshot-*"):
            name = ObjectName.of_file(file.name)
            record, data = store.catalog.object(file.name), bytearray(file.read_bytes())
            assert name is not None and record is not None
            is_first = store.catalog.snapshot(name.snapshot_id) is not None
            assert file.name in hosts or is_first
            data[:HEADER_BYTES] = bytes(HEADER_BYTES)
            if is_first:
                start = HEADER_BYTES + record.data_bytes
                data[start : start + record.footer_bytes] = bytes(record.footer_bytes)
            for (of_file, place), size in places.items():
                if of_file == file.name:
                    data[place : place + size] = bytes(size)
            assert not any(data), file


def assert_states(path: str, history: History, kept: set[int]) -> None:
    """All of these seqs are reachable, as they were, and no other is."""
    store = Store.open(path)
    for seq in kept:
        resolution = store.at_seq(seq)
        assert (resolution.seq, resolution.time_ns) == (seq, history.times_ns[seq])
        for volume in range(len(history.volumes)):
            assert read_image(store, resolution, volume) == history.states[seq][volume]
    for seq in range(min(kept), history.at[0] + 1):
        assert store.at_seq(seq).seq == max(each for each in kept if each <= seq)
        resolution, is_exact = store.at_time(history.times_ns[seq])
        assert resolution.seq == max(each for each in kept if each <= seq)
        if resolution.seq == seq:
            assert is_exact
        elif is_exact:
            assert history.states[seq] == history.states[resolution.seq]
    assert {int(each.name[5:]) for each in store.bookmarks()} <= kept
    assert {snapshot.seq for snapshot in store.snapshots()} <= {each.seq for each in store.bookmarks()} | {0, min(kept)}
    assert all(gap.to_time_ns > history.times_ns[min(kept)] for gap in store.gaps())
    seconds = [
        resolution.seq for day in store.days() for minute in store.minutes(day) for resolution in store.seconds(minute)
    ]
    last = {history.times_ns[seq] // SECOND_NS: seq for seq in sorted(kept)}
    assert seconds == list(last.values())
    store.close()


def removed(path: str, kept: set[int], after_id: int | None, before_id: int) -> set[int]:
    """What is left of these seqs when the snapshots between go."""
    with opened(path) as store:
        after = store.catalog.snapshot(after_id) if after_id else None
        before = store.catalog.snapshot(before_id)
    assert before is not None
    return {seq for seq in kept if seq >= before.seq or (after is not None and seq <= after.seq)}


@pytest.mark.parametrize("seed", range(100, 109))
def test_random_removals_leave_the_other_states_and_only_what_these_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    history = random_history(seed, max_block_count=1200 if seed % 4 == 0 else 40)
    random = np.random.default_rng([seed, 17])
    with an_earlier_pitfs() if seed % 5 == 0 else nullcontext():
        path, kept = made(tmp_path, history, 10), history.reachable
    while len(there := ids(path)) > 2:
        before = int(random.integers(1, len(there)))
        after = int(random.integers(-1, before))
        after_id = there[after] if after >= 0 else None
        kept = removed(path, kept, after_id, there[before])
        size = allocated(path)
        monkeypatch.setattr(removal_module, "MAX_MOVED_BYTES", (1 << 20, 40960, 0)[int(random.integers(3))])
        with opened(path) as store, changes_locked(path):
            foretold, freed = remove(store, after_id, there[before])
            assert store.catalog.removals() == []
        assert freed == size - allocated(path)
        assert abs(foretold - freed) <= 8192  # what the file system itself needs for many holes in a file
        assert_states(path, history, kept)
        assert_only_the_living_is_there(path)
    ingest = Ingest(str(tmp_path), history.hello)  # and it goes on from there
    ingest_transfer(ingest, history.close_interval(bookmarks=(f"mark-{history.write().seq}",)))
    ingest.close()
    assert_states(path, history, kept | {seq for seq in history.reachable if seq > max(kept)})


def test_who_reads_what_stays_goes_on_all_the_while(tmp_path: Path) -> None:
    history = History(8, (VolumeInfo("a", 90_000, 4096), VolumeInfo("b", 20_000, 512)))
    path = made(tmp_path, history, 12)
    store, buffer, tables = Store.open(path), ReadBuffer(), TableCache(0)
    there = ids(path)

    def seqs_of(snapshot_ids: list[int]) -> list[int]:
        return [snapshot.seq for snapshot in store.snapshots() if snapshot.id in snapshot_ids]

    views = [
        (seq, volume, PointInTimeView(store, store.at_seq(seq), volume, tables))
        for seq in seqs_of([there[0], there[4], there[8], there[-1]]) for volume in (0, 1)
    ]  # fmt: skip

    def read_all(least_seq: int = 0) -> None:
        for seq, volume, view in views:
            for at in range(0, view.size_bytes, 1 << 14) if seq >= least_seq else ():
                size = min(1 << 14, view.size_bytes - at)
                data = view.try_read_cached(at, size, buffer) or view.read(at, size, buffer)
                assert data == history.states[seq][volume][at : at + size]

    for after, before in ((0, 4), (4, 8), (8, 12), (0, 8), (None, 8), (None, 12)):
        with opened(path) as writable:
            remove(writable, None if after is None else there[after], there[before])
        read_all(0 if after is not None else seqs_of([there[before]])[0])
    store.close()


def test_what_was_moved_stays_when_what_lies_beside_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LongHistory(tmp_path, VolumeInfo("root", 16 << 20, 4096)) as history:
        history.full_copy(block_count=500)
        history.snapshots(64, blocks_each=24)
    path = str(history.path)
    there, store = ids(path), Store.open(path)
    images = {seq: read_image(store, store.at_seq(seq), 0) for seq in [each.seq for each in store.snapshots()]}
    store.close()
    for step, max_moved_bytes in ((8, 1 << 20), (32, 0), (64, 0), (0, 0)):
        monkeypatch.setattr(removal_module, "MAX_MOVED_BYTES", max_moved_bytes)
        with opened(path) as writable:
            for number in range(step, 65, step) if step else ():
                remove(writable, there[number - step], there[number])
            if not step:
                remove(writable, None, there[64])
        store = Store.open(path)
        for snapshot in store.snapshots():
            assert read_image(store, store.at_seq(snapshot.seq), 0) == images[snapshot.seq]
        store.close()
        assert_only_the_living_is_there(path)


def test_a_pruned_store_is_no_larger_than_one_that_only_received_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(History, "_keep_state", lambda self: None)
    sizes = []
    for each, step in (("all", 1), ("some", 4)):
        history = History(3, (VolumeInfo("a", 4 << 20, 4096),))
        ingest = Ingest(str(tmp_path / each), history.hello)
        ingest_transfer(ingest, history.close_interval(None))
        for number in range(1, 13):
            for _ in range(150):
                history.write()
            if number % step == 0:
                ingest_transfer(ingest, history.close_interval(None))
        ingest.close()
        there = ids(ingest.path)
        with opened(ingest.path) as store:
            for after, before in ((0, 4), (8, 12), (4, 8)) if step == 1 else ():
                remove(store, there[after], there[before])
        sizes.append(allocated(ingest.path))
    assert sizes[0] <= 1.02 * sizes[1]


def test_without_room_to_move_anything_the_rest_is_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = History(6, (VolumeInfo("a", 60_000, 4096),))
    path = made(tmp_path, history, 8)
    there = ids(path)
    kept = removed(path, history.reachable, there[0], there[-1])

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with opened(path) as store, monkeypatch.context() as patch:
        patch.setattr(moving, "write_all", full)
        foretold, freed = remove(store, there[0], there[-1])
        assert 0 < freed < foretold + 4096 * 32
        assert store.catalog.rows("SELECT * FROM moved") == []
    assert_states(path, history, kept)
    assert_only_the_living_is_there(path)


def test_what_was_prepared_and_is_not_done_leaves_nothing(tmp_path: Path) -> None:
    history = History(6, (VolumeInfo("a", 60_000, 4096),))
    path = made(tmp_path, history, 8)
    there, size = ids(path), allocated(path)
    with opened(path) as store:
        removal = Removal(store, there[0], there[-1])
        removal.prepare()
        assert allocated(path) > size
        removal.drop()
    assert allocated(path) == size


def test_logs_that_power_loss_brings_back_are_explained_when_their_snapshots_are_gone(tmp_path: Path) -> None:
    history = History(6, (VolumeInfo("a", 60_000, 4096),))
    path = made(tmp_path, history, 8)
    there = ids(path)
    with opened(path) as store:
        logs = [each - 1 for each in there[1:-1] if each - 1 not in there and each > there[-1] - 60]
        assert logs
        remove(store, there[0], there[-1])
        for each in logs:
            log = Path(store.objects.path_of(ObjectName(ObjectKind.JOURNAL_BLOCKS, each)))
            log.parent.mkdir(exist_ok=True)
            log.write_bytes(b"old")
    Ingest(str(tmp_path), history.hello).close()
    assert_only_the_living_is_there(path)


class Killed(BaseException):
    """The process is dead: nothing of it runs after this."""


@contextmanager
def killed_at(monkeypatch: pytest.MonkeyPatch, number: int) -> Iterator[list[str]]:
    """Call `number` (from 0) of those that change the disk kills, and all after it do."""
    seen: list[str] = []

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            seen.append(name)
            if len(seen) > number >= 0:
                raise Killed
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("pwrite", "fsync", "ftruncate", "unlink", "rmdir", "open"):
            patch.setattr(os, name, wrap(name, getattr(os, name)))
        patch.setattr(removal_module, "punch", wrap("punch", removal_module.punch))
        patch.setattr(Catalog, "put", wrap("put", Catalog.put))
        yield seen


@pytest.mark.parametrize(("of_first", "max_moved_bytes"), [(False, 16384), (True, 16384), (False, 0)])
def test_a_removal_killed_anywhere_is_finished_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_first: bool, max_moved_bytes: int
) -> None:
    monkeypatch.setattr(removal_module, "MAX_MOVED_BYTES", max_moved_bytes)
    history = History(6, (VolumeInfo("a", 60_000, 4096), VolumeInfo("b", 9_000, 512)))
    path = made(tmp_path / "made", history, 8)
    there = ids(path)
    after_id, before_id = (None, there[2]) if of_first else (there[1], there[6])
    kept = removed(path, history.reachable, after_id, before_id)
    shutil.copytree(tmp_path / "made", tmp_path / "whole")
    with opened(str(tmp_path / "whole" / history.group)) as store, killed_at(monkeypatch, -1) as calls:
        remove(store, after_id, before_id)
    assert {"punch", "unlink", "put"} <= set(calls)
    for number in range(len(calls)):
        root = tmp_path / str(number)
        shutil.copytree(tmp_path / "made", root)
        path = str(root / history.group)
        with opened(path) as store, killed_at(monkeypatch, number), suppress(Killed):
            remove(store, after_id, before_id)
        with opened(path) as store:
            is_done = store.catalog.snapshot(there[2] if not of_first else there[0]) is None
        if number % 3 == 0:  # a receiver starts meanwhile
            Ingest(str(root), history.hello).close()
        assert_states(path, history, kept if is_done else history.reachable)
        with opened(path) as store:
            for removal in Removal.unfinished(store):
                removal.free()
            if not is_done:
                remove(store, after_id, before_id)
            assert store.catalog.removals() == []
        assert_states(path, history, kept)
        assert_only_the_living_is_there(path)
        Ingest(str(root), history.hello).close()
        shutil.rmtree(root)
