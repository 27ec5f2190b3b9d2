"""Which image a loop device is over, from what the kernel's tables say."""

from __future__ import annotations

import pytest

from pitfs.fuse.attach.images import image_of
from pitfs.fuse.kernel.loop_devices import LoopDevice
from pitfs.fuse.kernel.mountinfo import MountInfo, escaped, parse

INSTANT = "2026-11-22T23-54-00.123456789Z"


def mount(place: str, kind: str = "fuse.pitfs", whole: bool = True) -> MountInfo:
    return MountInfo(place, "0:52", kind, "/srv/db1", True, whole)


MOUNTED = [
    mount("/", "ext4"), mount("/mnt/db1"), mount("/mnt/db12"), mount("/mnt/db1/2026/x", "ext4"),
    mount("/bound", whole=False), mount("/mnt/again", "ext4"), mount("/mnt/again"),
    mount("/run/pitfs/db1", "fuse.pitfs-splitter"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("backing", "place"),
    [
        (f"/mnt/db1/{INSTANT}/root.img", "/mnt/db1"),
        (f"/mnt/db12/{INSTANT}/root.img", "/mnt/db12"),
        (f"/mnt/again/{INSTANT}/root.img", "/mnt/again"),
        (f"/{INSTANT}/root.img", None),
    ],
)
def test_an_image_is_told_by_where_it_lies(backing: str, place: str | None) -> None:
    image = image_of(LoopDevice("/dev/loop7", backing, True), MOUNTED)
    assert image is not None
    assert (image.instant, image.volume) == (INSTANT, "root")
    assert (image.mount.mountpoint if image.mount else None) == place


@pytest.mark.parametrize(
    "backing",
    ["/srv/root.img", "/mnt/db1/root.img", "/mnt/db1/2026/x/y.img", "/bound/x/root.img", "/run/pitfs/db1/root",
     "/a/b.img", "", f"/{INSTANT}/x/root.img"],
)  # fmt: skip
def test_what_is_no_image_is_none(backing: str) -> None:
    assert image_of(LoopDevice("/dev/loop7", backing, True), MOUNTED) is None


def test_names_are_escaped_as_the_kernel_does() -> None:
    assert escaped("/a b\\c\td") == "/a\\040b\\134c\\011d"


@pytest.mark.parametrize("character", ["\u00a0", "\u2028", "\x0b", "\x1c", "\x85", "\r"])
def test_any_character_but_white_space_stands_in_the_kernels_table_as_it_is(character: str) -> None:
    place = f"/mnt/a{character}b"
    lines = [f"30 1 0:52 / {place} ro,relatime shared:1 - fuse.pitfs /srv/{character} ro,user_id=0\n"]
    assert list(parse(lines)) == [MountInfo(place, "0:52", "fuse.pitfs", f"/srv/{character}", True, True)]
