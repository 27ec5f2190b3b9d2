"""Long histories and huge volumes: what is read doesn't grow with them. Counted, not timed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pitfs.cli.main import main
from pitfs.model.position import DAY_NS, format_instant
from pitfs.model.transfer import VolumeInfo
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.catalog.database import Database
from pitfs.store.objects.pool import ObjectPool
from pitfs.store.store import Store
from pitfs.view.inodes import ROOT_INODE
from pitfs.view.tree import Tree
from pitfs.view.view import PointInTimeView, ReadBuffer
from tests.helpers.histories import START_NS, LongHistory, StrewnWrites, block_contents
from tests.helpers.stores import object_files

SIZE = 512
TIB = 1 << 40


class Counted:
    """What a store was asked for: rows of the catalog, reads of objects and their bytes."""

    def __init__(self) -> None:
        self.rows = self.questions = self.reads = self.read_bytes = 0

    @contextmanager
    def counting(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        rows, verified = Database.rows, ObjectPool.read_verified

        def ask(catalog: Database, *question: Any) -> list[tuple[Any, ...]]:
            found = rows(catalog, *question)
            self.questions += 1
            self.rows += len(found)
            return found

        def read(pool: ObjectPool, name: Any, size: int, *more: Any) -> bytes:
            self.reads += 1
            self.read_bytes += size
            return verified(pool, name, size, *more)

        with monkeypatch.context() as patched:
            patched.setattr(Database, "rows", ask)
            patched.setattr(ObjectPool, "read_verified", read)
            yield


@pytest.mark.parametrize("way", ["streamed", "open", "transfer"])
def test_each_block_holds_in_each_state_what_the_formula_says(tmp_path: Path, way: str) -> None:
    with LongHistory(tmp_path, VolumeInfo("root", 4096 * SIZE, SIZE)) as history:
        history.full_copy(100)
        history.snapshots(3, blocks_each=2, first_block=200, span=100)
        writes = history.interval(
            700, 256, first_block=1000, stride=2, data_every=3, streamed=way != "transfer", is_open=way == "open"
        )
        store, buffer = Store.open(str(history.path)), ReadBuffer()
        for number in (0, 1, 100, 255, 256, 699):
            seq = writes.seq(number)
            resolution = store.at_seq(seq)
            assert (resolution.seq, resolution.time_ns) == (seq, writes.time_ns(number))
            assert store.at_time(writes.time_ns(number)) == (resolution, True)
            view = PointInTimeView(store, resolution, 0)
            assert view.read(99 * SIZE, SIZE, buffer) == block_contents(0, SIZE)
            for block in range(990, 1520):
                wanted = writes.state(block, seq, SIZE) or bytes(SIZE)
                assert view.read(block * SIZE, SIZE, buffer) == wanted
        store.close()


@pytest.fixture(scope="module")
def intervals(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, StrewnWrites]]:
    """The same volume with an interval of 4,096 writes, and of 262,144."""
    made = []
    for count in (1 << 12, 1 << 18):
        root = tmp_path_factory.mktemp("interval")
        with LongHistory(root, VolumeInfo("root", 1 << 24, SIZE)) as history:
            history.full_copy()
            made.append((history.path, history.interval(count, 1 << 15, data_every=64, streamed=False)))
    return made


def test_an_instant_of_a_long_interval_is_opened_and_read_in_as_few_reads(
    intervals: list[tuple[Path, StrewnWrites]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for path, writes in intervals:
        counted, store, buffer = Counted(), Store.open(str(path)), ReadBuffer()
        for number in (writes.count // 2, writes.count // 3):  # the first one reads the sparse index
            with counted.counting(monkeypatch):
                resolution = store.at_instant(writes.time_ns(number))
                assert resolution is not None
                data = PointInTimeView(store, resolution, 0).read(4096, 4096, buffer)
            assert data == b"".join(writes.state(8 + i, writes.seq(number), SIZE) or bytes(SIZE) for i in range(8))
        store.close()
        found.append(counted)
    short, long = found
    assert (long.rows, long.questions) == (short.rows, short.questions)
    # A leaf's entries are in 2 or 3 chunks of 2048 where each block was written 8 times, in one where it wasn't.
    assert short.reads <= 3 + 1 and long.reads <= 3 + 2 * 4
    assert long.read_bytes <= long.reads * (64 << 10)


def test_listing_seconds_costs_the_same_with_more_writes_behind_them(
    intervals: list[tuple[Path, StrewnWrites]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    for path, writes in intervals:
        counted, store = Counted(), Store.open(str(path))
        first, last = (writes.time_ns(number) // 10**9 for number in (0, writes.count - 1))
        minute = first // 60 + (2 if last // 60 > first // 60 + 2 else 0)
        with counted.counting(monkeypatch):
            listed = list(store.seconds(minute))
        assert [each.time_ns // 10**9 for each in listed] == [
            second for second in range(minute * 60, minute * 60 + 60) if first <= second <= last
        ]
        asked.append(counted.questions / len(listed))
        store.close()
    assert asked[1] <= asked[0]


SNAPSHOTS = 800


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with LongHistory(tmp_path_factory.mktemp("snapshots"), VolumeInfo("root", 1 << 20, SIZE)) as history:
        history.full_copy()
        history.snapshots(SNAPSHOTS)
        return history.path


def test_what_is_asked_of_one_of_many_snapshots_is_a_few_rows(
    snapshots: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(str(snapshots))
    tree = Tree(store, lambda: START_NS + 10**15)
    middle_ns = START_NS + SNAPSHOTS // 2 * 10**9
    inode = tree.lookup(ROOT_INODE, format_instant(middle_ns).encode()).inode

    def few(ask: Callable[[], object], limit: int) -> None:
        counted = Counted()
        with counted.counting(monkeypatch):
            ask()
        assert counted.rows <= limit, ask

    for ask in (
        store.first, store.latest, lambda: store.at_time(middle_ns + 5), lambda: store.at_seq(7),
        lambda: list(store.snapshots(middle_ns, middle_ns + 1)), lambda: store.snapshots(middle_ns).__next__(),
        lambda: list(store.intervals(middle_ns, middle_ns + 1)), lambda: list(store.gaps(middle_ns, middle_ns + 1)),
        lambda: tree.lookup(ROOT_INODE, format_instant(middle_ns + 10**9).encode()),
        lambda: tree.attributes_of(inode), lambda: tree.entry(ROOT_INODE),
        lambda: next(store.minutes(middle_ns // DAY_NS)),
    ):  # fmt: skip
        few(ask, 20)
    store.close()


def test_a_directory_that_is_read_on_elsewhere_each_time_takes_rows_in_proportion(
    snapshots: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As several workers of one mount may do it: each reply begins a listing of its own at the cookie."""
    store = Store.open(str(snapshots))
    tree, counted, cookie, names = Tree(store, lambda: START_NS), Counted(), 0, list[str]()
    with counted.counting(monkeypatch):
        while True:
            page = [each for each, _ in zip(tree.listing(ROOT_INODE, cookie), range(100), strict=False)]
            if not page:
                break
            names += [name for name, _, _ in page]
            cookie = page[-1][2]
    assert names == ["latest", "bookmarks", "times"] + [
        format_instant(START_NS + number * 10**9) for number in range(SNAPSHOTS + 1)
    ]
    assert counted.rows < 3 * len(names)
    store.close()


def test_which_files_nobody_knows_is_asked_by_the_page(snapshots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the start of a writer does."""
    catalog = Catalog(str(snapshots / "catalog.sqlite"))
    names, counted = [path.name for path in object_files(snapshots)], Counted()
    with counted.counting(monkeypatch):
        assert catalog.unknown_objects([*names, "snapshot-00000000000fffff.map"]) == ["snapshot-00000000000fffff.map"]
    assert counted.questions <= 1 + len(names) // 512 + 1
    catalog.close()


@pytest.fixture
def huge(tmp_path: Path) -> tuple[Path, StrewnWrites, int]:
    """16 TiB of which the last few blocks were written."""
    with LongHistory(tmp_path, VolumeInfo("root", 16 * TIB, 4096)) as history:
        blocks = history.volume.block_count
        history.full_copy(10, first_block=blocks - 10)
        return history.path, history.interval(100, 64, first_block=blocks - 1024, data_every=1), blocks


@pytest.mark.parametrize("place", ["intermediary", "snapshot"])
def test_a_huge_volume_is_read_at_its_end_and_walked_by_what_it_has(
    huge: tuple[Path, StrewnWrites, int], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    path, writes, blocks = huge
    store, counted, buffer = Store.open(str(path)), Counted(), ReadBuffer()
    resolution = store.at_seq(writes.seq(49)) if place == "intermediary" else store.latest()
    assert resolution is not None and resolution.kind == place
    with counted.counting(monkeypatch):
        assert PointInTimeView(store, resolution, 0).read(blocks * 4096 - 4096, 4096, buffer) == block_contents(0, 4096)
        ranges = list(PointInTimeView(store, resolution, 0).data_ranges())
        assert list(PointInTimeView(store, resolution, 0).data_ranges(0, 15 * TIB)) == []
    assert ranges[-1] == ((blocks - 10) * 4096, blocks * 4096)
    written = 50 if place == "intermediary" else 64
    assert sum(end - start for start, end in ranges) == (written + 10) * 4096
    assert counted.reads <= 10
    store.close()


def test_a_huge_volume_is_exported_by_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    size = 8 * TIB  # ext4 has no files of 16
    with LongHistory(tmp_path, VolumeInfo("root", size, 4096)) as history:
        history.full_copy(3, first_block=size // 4096 - 3)
    reads, real = list[int](), PointInTimeView.read

    def read(view: PointInTimeView, offset: int, count: int, buffer: ReadBuffer) -> memoryview:
        reads.append(count)
        return real(view, offset, count, buffer)

    monkeypatch.setattr(PointInTimeView, "read", read)
    assert main(["export", str(history.path), "latest", "root", str(tmp_path / "image")]) == 0
    assert sum(reads) == 3 * 4096
    fd = os.open(tmp_path / "image", os.O_RDONLY)
    try:
        assert os.fstat(fd).st_size == size
        assert os.lseek(fd, 0, os.SEEK_DATA) >= size - (1 << 20)
        assert os.pread(fd, 8192, size - 8192) == 2 * block_contents(0, 4096)
    finally:
        os.close(fd)
    assert "verified" not in capfd.readouterr().err
