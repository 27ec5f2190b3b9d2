"""The tree of a mount, without a mount: names, links, listings, inode numbers."""

from __future__ import annotations

import tracemalloc
import zoneinfo
from typing import Any

import pytest

from pitfs.model.position import format_instant
from pitfs.model.transfer import VolumeInfo
from pitfs.view.tree import (
    BOOKMARKS_INODE,
    LATEST_INODE,
    MAX_SEQ,
    ROOT_INODE,
    TIMES_INODE,
    Entry,
    Kind,
    NoEntryError,
    Tree,
    Type,
    pack_inode,
    unpack_inode,
)
from tests.helpers.fake_store import FakeStore

T0 = 1_795_391_640 * 10**9  # 2026-11-22T23:54:00Z
SECOND = 10**9
# seq:        0   1           2               3               4                5
TIMES = [T0, T0 + 5, T0 + SECOND, T0 + 90 * SECOND, T0 + 90 * SECOND + 1, T0 + 600 * SECOND]
VOLUMES = (VolumeInfo("root", 1 << 20, 4096), VolumeInfo("data", 12_345, 512))


def make(strict: bool = False, zone: str = "UTC", **more: Any) -> tuple[Tree, FakeStore]:
    more.setdefault("bookmarks", [("before-upgrade", 3), ("a", 3), ("start", 0)])
    store = FakeStore(TIMES, [3, 5], VOLUMES, **more)
    return Tree(store, lambda: T0 + 700 * SECOND, zoneinfo.ZoneInfo(zone), strict), store  # type: ignore[arg-type]


def listed(tree: Tree, inode: int) -> dict[str, Entry]:
    return {name: entry for name, entry, _ in tree.listing(inode, 0)}


def leads_to(tree: Tree, name: str, parent: int = ROOT_INODE) -> str:
    entry = tree.lookup(parent, name.encode())
    assert entry.type is Type.LINK
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
            if entry.type is Type.DIRECTORY:
                to_do.append(entry.inode)
            elif entry.type is Type.LINK:
                assert tree.lookup(ROOT_INODE, tree.target(entry.inode).split("/")[-1].encode())
    assert seen == 24


def test_an_instant_that_is_no_snapshot_is_a_directory_when_named() -> None:
    tree, _ = make()
    entry = tree.lookup(ROOT_INODE, format_instant(TIMES[1]).encode())
    assert (entry.type, entry.mtime_ns, entry.permanent) == (Type.DIRECTORY, TIMES[1], True)
    assert list(listed(tree, entry.inode)) == ["root.img", "data.img"]
    image = tree.lookup(entry.inode, b"data.img")
    assert (image.type, image.size, image.mtime_ns) == (Type.FILE, 12_345, TIMES[1])


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
    assert list(listed(tree, BOOKMARKS_INODE)) == ["start", "a", "before-upgrade"]
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
    assert unpack_inode(pack_inode(Kind.IMAGE, 1023, MAX_SEQ)) == (Kind.IMAGE, 1023, MAX_SEQ)


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
    with pytest.raises(NoEntryError):
        tree.entry(inode)


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
