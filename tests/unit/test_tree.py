"""The tree of a mount, without a mount: names, links, listings, inode numbers."""

from __future__ import annotations

import itertools
import tracemalloc
import zoneinfo
from collections.abc import Iterator
from typing import Any

import pytest

from pitfs.model.position import format_instant
from pitfs.model.transfer import Bookmark, Gap, VolumeInfo
from pitfs.view import bookmarks as bookmarks_module
from pitfs.view.inodes import (
    BOOKMARKS_INODE,
    LATEST_INODE,
    MAX_SEQ,
    ROOT_INODE,
    TIMES_INODE,
    EntryType,
    InodeKind,
    NoEntryError,
    TreeEntry,
    pack_inode,
    unpack_inode,
)
from pitfs.view.tree import Tree
from tests.helpers.fake_store import FakeStore

T0 = 1_795_391_640 * 10**9  # 2026-11-22T23:54:00Z
SECOND = 10**9
# seq:        0   1           2               3               4                5
TIMES = [T0, T0 + 5, T0 + SECOND, T0 + 90 * SECOND, T0 + 90 * SECOND + 1, T0 + 600 * SECOND]
VOLUMES = (VolumeInfo("root", 1 << 20, 4096), VolumeInfo("data", 12_345, 512))


class PagedStore(FakeStore):
    """Listings begin where they are asked to; `fetched` counts what they gave."""

    fetched = 0

    def bookmarks(self, from_ns: int | None = None) -> Iterator[Bookmark]:
        for each in super().bookmarks():
            if from_ns is None or each.time_ns >= from_ns:
                self.fetched += 1
                yield each

    def days(self, from_day: int = 0) -> Iterator[int]:
        for day in super().days():
            if day >= from_day:
                self.fetched += 1
                yield day


def make(strict: bool = False, zone: str = "UTC", **more: Any) -> tuple[Tree, PagedStore]:
    more.setdefault("bookmarks", [("before-upgrade", 3), ("a", 3), ("start", 0)])
    store = PagedStore(TIMES, [3, 5], VOLUMES, **more)
    return Tree(store, lambda: T0 + 700 * SECOND, zoneinfo.ZoneInfo(zone), strict), store  # type: ignore[arg-type]


def listed(tree: Tree, inode: int) -> dict[str, TreeEntry]:
    return {name: entry for name, entry, _ in tree.listing(inode, 0)}


def pages(tree: Tree, inode: int, size: int) -> Iterator[list[str]]:
    """Names as a caller gets them who has room for `size` at a time."""
    cookie = 0
    while page := list(itertools.islice(tree.listing(inode, cookie), size)):
        yield [name for name, _, _ in page]
        cookie = page[-1][2]
        assert 0 < cookie < 1 << 63


def leads_to(tree: Tree, name: str, parent: int = ROOT_INODE) -> str:
    entry = tree.lookup(parent, name.encode())
    assert entry.type is EntryType.LINK
    target = tree.target(entry.inode)
    assert entry.size == len(target)
    return target


def test_the_root_lists_what_is_fixed_and_the_snapshots() -> None:
    tree, _ = make()
    assert list(listed(tree, ROOT_INODE)) == ["latest", "bookmarks", "times"] + [
        format_instant(TIMES[seq]) for seq in (0, 3, 5)
    ]


def test_every_listed_entry_can_be_looked_up_and_is_the_same() -> None:
    tree, _ = make()
    to_do, seen = [ROOT_INODE], 0
    while to_do:
        directory = to_do.pop()
        for name, entry in listed(tree, directory).items():
            seen += 1
            assert tree.lookup(directory, name.encode()) == entry
            assert tree.entry(entry.inode) == entry
            if entry.type is EntryType.DIRECTORY:
                to_do.append(entry.inode)
            elif entry.type is EntryType.LINK:
                assert tree.lookup(ROOT_INODE, tree.target(entry.inode).split("/")[-1].encode())
    assert seen == 24


def test_an_instant_that_is_no_snapshot_is_a_directory_when_named() -> None:
    tree, _ = make()
    entry = tree.lookup(ROOT_INODE, format_instant(TIMES[1]).encode())
    assert (entry.type, entry.mtime_ns, entry.permanent) == (EntryType.DIRECTORY, TIMES[1], True)
    assert list(listed(tree, entry.inode)) == ["root.img", "data.img"]
    image = tree.lookup(entry.inode, b"data.img")
    assert (image.type, image.size, image.mtime_ns) == (EntryType.FILE, 12_345, TIMES[1])


def test_any_other_way_to_say_a_time_is_a_link() -> None:
    tree, _ = make()
    assert leads_to(tree, format_instant(T0 + 7)) == format_instant(TIMES[1])
    assert leads_to(tree, "2026-11-22T23:54:00Z") == format_instant(TIMES[0])
    assert leads_to(tree, "2026-11-22T23:54:59") == format_instant(TIMES[2])
    assert leads_to(tree, "100s-ago") == format_instant(TIMES[5])
    assert leads_to(tree, "seq-4") == format_instant(TIMES[4])
    assert leads_to(tree, f"@{T0 // SECOND}.000000005") == format_instant(TIMES[1])
    assert tree.target(LATEST_INODE) == format_instant(TIMES[5])


def test_a_time_without_zone_is_in_the_zone_of_the_mount() -> None:
    tree, _ = make(zone="Europe/Vienna")
    assert leads_to(tree, "2026-11-23T00:54") == format_instant(TIMES[0])


@pytest.mark.parametrize(
    "name",
    [
        b"", b".", b"..", b"nothing", b"\xff\xfe", b"\xc3", b"x" * 255, b"2" * 255, b"seq-6", b"@0",
        b"2026-11-22T23:53:59", b"2026-11-23T00:04:01Z", b"1s-ago", b"1h-ago", b"root", b"seq-1\x00",
    ],
)  # fmt: skip
def test_what_leads_nowhere_is_no_entry(name: bytes) -> None:
    tree, _ = make()
    for directory in (ROOT_INODE, BOOKMARKS_INODE, TIMES_INODE):
        with pytest.raises(NoEntryError):
            tree.lookup(directory, name)


def test_a_time_after_the_last_write_but_protected_is_the_last_state() -> None:
    tree, _ = make(protected_through_ns=T0 + 699 * SECOND)
    assert leads_to(tree, "1s-ago") == format_instant(TIMES[5])


def test_strict_gives_only_what_can_be_given_exactly() -> None:
    lenient, _ = make(coarse=[3])
    strict, _ = make(coarse=[3], strict=True)
    between = "2026-11-22T23:54:30Z"
    assert leads_to(lenient, between) == format_instant(TIMES[0])
    assert leads_to(lenient, "seq-2") == format_instant(TIMES[0])
    for name in (between, "seq-2", format_instant(TIMES[2])):
        with pytest.raises(NoEntryError):
            strict.lookup(ROOT_INODE, name.encode())
    assert leads_to(strict, "2026-11-22T23:54:00Z") == format_instant(TIMES[0])
    # between two writes of a journal the state is known, though no write was at that time
    assert leads_to(strict, format_instant(TIMES[4] + 1)) == format_instant(TIMES[4])


def test_bookmarks_are_links_one_directory_up() -> None:
    tree, _ = make()
    names = list(listed(tree, BOOKMARKS_INODE))
    assert names[0] == "start" and sorted(names[1:]) == ["a", "before-upgrade"]
    assert leads_to(tree, "a", BOOKMARKS_INODE) == "../" + format_instant(TIMES[3])


def test_any_second_is_found_through_times() -> None:
    tree, _ = make()
    (day, day_entry), (day2, day2_entry) = listed(tree, TIMES_INODE).items()
    assert (day, day2) == ("2026-11-22", "2026-11-23")
    assert list(listed(tree, day_entry.inode)) == ["23-54", "23-55"]
    assert list(listed(tree, day2_entry.inode)) == ["00-04"]
    minute = tree.lookup(day_entry.inode, b"23-54")
    assert list(listed(tree, minute.inode)) == ["23-54-00", "23-54-01"]
    assert leads_to(tree, "23-54-00", minute.inode) == "../../../" + format_instant(TIMES[1])
    for name in (b"23-54-02", b"23-55-30", b"00", b"23-54-60"):
        with pytest.raises(NoEntryError):
            tree.lookup(minute.inode, name)
    for name in (b"23-53", b"24-00", b"2354"):
        with pytest.raises(NoEntryError):
            tree.lookup(day_entry.inode, name)
    with pytest.raises(NoEntryError):
        tree.lookup(TIMES_INODE, b"2026-11-21")


def test_what_may_change_is_not_permanent() -> None:
    tree, _ = make()
    for name in (b"latest", b"bookmarks", b"times", b"5m-ago", b"seq-1"):
        assert not tree.lookup(ROOT_INODE, name).permanent


def test_inode_numbers_say_it_all_and_are_unique() -> None:
    tree, _ = make()
    seen: dict[int, str] = {}
    for seq in range(6):
        directory = tree.lookup(ROOT_INODE, format_instant(TIMES[seq]).encode())
        for name, inode in [("", directory.inode), *((n, e.inode) for n, e in listed(tree, directory.inode).items())]:
            assert 0 < inode < 1 << 63
            assert seen.setdefault(inode, f"{seq}/{name}") == f"{seq}/{name}"
    assert unpack_inode(pack_inode(InodeKind.IMAGE, 1023, MAX_SEQ)) == (InodeKind.IMAGE, 1023, MAX_SEQ)


@pytest.mark.parametrize(
    "inode", [0, 5, 1 << 56 | 99, 2 << 56 | 7 << 46 | 3, 3 << 56 | 99, 9 << 56, (1 << 64) - 1]
)
def test_an_inode_number_that_is_nobodys_is_no_entry(inode: int) -> None:
    tree, _ = make()
    for ask in (tree.entry, tree.target, lambda number: list(tree.listing(number, 0))):
        with pytest.raises(NoEntryError):
            ask(inode)


def test_a_state_that_is_gone_is_no_entry() -> None:
    tree, store = make()
    inode = tree.lookup(ROOT_INODE, format_instant(TIMES[1]).encode()).inode
    assert tree.entry(inode)
    store.coarse.add(3)
    store.version += 1
    tree.lookup(ROOT_INODE, b"seq-5")  # whatever has to ask the store notices
    assert not tree.knows(inode)
    with pytest.raises(NoEntryError):
        tree.entry(inode)


def test_what_is_known_is_answered_without_the_store() -> None:
    tree, store = make()
    instant = tree.lookup(ROOT_INODE, format_instant(TIMES[1]).encode()).inode
    link = tree.lookup(ROOT_INODE, b"seq-1").inode
    assert tree.knows(instant) and tree.knows(link)
    for inode in (ROOT_INODE, LATEST_INODE, BOOKMARKS_INODE, TIMES_INODE, 0, 9 << 56 | 1, (1 << 64) - 1):
        assert not tree.knows(inode)

    def asked(*_: object) -> Any:
        raise AssertionError("the store was asked")

    for name in ("data_version", "at_seq", "at_time", "at_instant", "latest"):
        setattr(store, name, asked)
    image = tree.lookup(instant, b"root.img").inode
    assert [name for name, _, _ in tree.listing(instant, 0)] == ["root.img", "data.img"]
    assert tree.entry(instant).inode == instant and tree.target(link) == format_instant(TIMES[1])
    assert tree.entry(image).size == 1 << 20 and tree.resolution_of(image)


def test_a_listing_goes_on_behind_any_entry_also_when_others_come() -> None:
    for directory in (ROOT_INODE, BOOKMARKS_INODE, TIMES_INODE):
        tree, store = make()
        whole = list(tree.listing(directory, 0))
        for index, (_, _, cookie) in enumerate(whole):
            assert list(tree.listing(directory, cookie)) == whole[index + 1 :]
    tree, store = make()
    whole = list(tree.listing(ROOT_INODE, 0))
    store.ends.insert(1, 1)  # a snapshot appears before the place where the listing goes on
    assert list(tree.listing(ROOT_INODE, whole[4][2])) == whole[5:]


@pytest.mark.parametrize("mask", [bookmarks_module.HASH_MASK, 0x3FF, 0xFF])
def test_many_bookmarks_at_one_position_are_each_listed_once(mask: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where hashes collide, and when more come than are held at once."""
    monkeypatch.setattr(bookmarks_module, "HASH_MASK", mask)
    monkeypatch.setattr(bookmarks_module, "MAX_PAGE", 200)
    count = 900 if mask > 0x3FF else 50
    marks = [(f"mark-{i}", seq) for seq in (2, 3, 4) for i in range(seq * 1000, seq * 1000 + count)]
    tree, _ = make(bookmarks=marks)
    for size in (1 if count == 50 else 37, 250):
        found = [name for page in pages(tree, BOOKMARKS_INODE, size) for name in page]
        assert sorted(found) == sorted(name for name, _ in marks)


def test_more_bookmarks_at_one_position_than_a_page_holds() -> None:
    tree, _ = make(bookmarks=[(f"mark-{i}", 3) for i in range(10_000)])
    assert len({name for page in pages(tree, BOOKMARKS_INODE, 3000) for name in page}) == 10_000
    assert len(list(tree.listing(BOOKMARKS_INODE, 0))) == 10_000


def test_a_bookmark_that_comes_while_others_are_listed_moves_none() -> None:
    for new in ("!", "mark-", "mark-20x", "zzz"):
        tree, store = make(bookmarks=[(f"mark-{i}", seq) for seq in (0, 3) for i in range(seq * 10, seq * 10 + 30)])
        before = [each.name for each in store.marked]
        found: list[str] = []
        for number, page in enumerate(pages(tree, BOOKMARKS_INODE, 7)):
            found += page
            if number == 6:  # in the middle of the second position
                store.marked.append(Bookmark(new, 3, TIMES[3]))
        assert sorted(name for name in found if name != new) == sorted(before)
        assert found.count(new) <= 1


def test_a_listing_goes_on_where_it_stopped_not_from_the_start() -> None:
    times = [T0 + i * 86_400 * SECOND for i in range(400)]
    store = PagedStore(times, range(1, 400), VOLUMES, bookmarks=[(f"mark-{i}", i) for i in range(400)])
    tree = Tree(store, lambda: T0)  # type: ignore[arg-type]
    for directory in (BOOKMARKS_INODE, TIMES_INODE):
        store.fetched = 0
        assert sum(len(page) for page in pages(tree, directory, 10)) == 400
        assert store.fetched < 400 + 41 * 3  # each page: the one before, and one that had no room


def test_an_empty_store_has_no_latest() -> None:
    tree, store = make()
    store.latest = lambda: None  # type: ignore[method-assign]
    assert "latest" not in listed(tree, ROOT_INODE)
    with pytest.raises(NoEntryError):
        tree.lookup(ROOT_INODE, b"latest")


def test_many_entries_are_listed_in_flat_memory() -> None:
    store = FakeStore(range(T0, T0 + 15_000), range(1, 15_000))
    tree = Tree(store, lambda: T0)  # type: ignore[arg-type]
    tracemalloc.start()
    try:
        last = ""
        for name, _, _ in tree.listing(ROOT_INODE, 3):
            assert last < name
            last = name
        assert tracemalloc.get_traced_memory()[1] < 300_000
    finally:
        tracemalloc.stop()


def test_many_instants_looked_up_take_bounded_memory() -> None:
    store = FakeStore(range(T0, T0 + 20_000), [19_999])
    tree = Tree(store, lambda: T0)  # type: ignore[arg-type]
    for seq in range(20_000):
        tree.resolution(seq)
        assert len(tree._resolutions) <= 4096


def gap(from_seq: int, to_seq: int) -> Gap:
    return Gap(from_seq, TIMES[from_seq], to_seq, TIMES[to_seq], "the local journal was full")


def walk(tree: Tree, *names: str) -> int:
    inode = ROOT_INODE
    for name in names:
        inode = tree.lookup(inode, name.encode()).inode
    return inode


def test_a_gap_is_shown_where_it_begins_with_its_cause_and_bounds() -> None:
    tree, store = make()
    store.gap_list = [gap(3, 5)]
    minute = walk(tree, "times", "2026-11-22", "23-55")
    listing = [name for name, _, _ in tree.listing(minute, 0)]
    assert listing == ["23-55-30", "23-55-30-gap"]
    link = walk(tree, "times", "2026-11-22", "23-55", "23-55-30-gap")
    assert tree.target(link) == "../../../" + format_instant(TIMES[3]), "the last state before it"
    for seq in (3, 5):
        words = tree.attributes_of(walk(tree, format_instant(TIMES[seq])))[b"user.pitfs.gap"].decode()
        assert words == f"{format_instant(TIMES[3])} -> {format_instant(TIMES[5])}: the local journal was full"
    assert b"user.pitfs.gap" not in tree.attributes_of(walk(tree, format_instant(TIMES[0])))
    with pytest.raises(NoEntryError):
        walk(tree, "times", "2026-11-22", "23-54", "23-54-01-gap")


def test_a_listing_with_a_gap_goes_on_behind_any_of_its_entries() -> None:
    tree, store = make()
    store.gap_list = [gap(0, 2), gap(3, 5)]
    minute = walk(tree, "times", "2026-11-22", "23-54")
    whole = list(tree.listing(minute, 0))
    assert [name for name, _, _ in whole] == ["23-54-00", "23-54-00-gap", "23-54-01"]
    for index, (_, _, cookie) in enumerate(whole):
        assert list(tree.listing(minute, cookie)) == whole[index + 1 :]
