"""list, resolve, digest and export of a store, as a user calls them, against the model."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from xxhash import xxh3_128_hexdigest

from pitfs.model.position import format_instant
from pitfs.model.transfer import VolumeInfo
from pitfs.restore import export
from pitfs.store.ingest import Ingest
from tests.helpers.commands import said
from tests.helpers.processes import run
from tests.helpers.stores import ingest_transfer, object_files
from tests.helpers.transfers import History

VOLUMES = (VolumeInfo("root", 3_300_001, 4096), VolumeInfo("data", 12_345, 512))


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    history = History(4, VOLUMES)
    ingest = Ingest(str(tmp_path), history.hello)
    for writes, granularity_ns, marks in ((0, 0, ["start"]), (20, 0, []), (15, None, []), (25, 0, ["5m-ago"])):
        for _ in range(writes):
            history.write()
        ingest_transfer(ingest, history.close_interval(granularity_ns, marks))
    yield history
    ingest.close()


@pytest.fixture
def store(history: History, tmp_path: Path) -> str:
    return str(tmp_path / history.group)


def name(history: History, seq: int) -> str:
    return format_instant(history.times_ns[seq])


def test_resolve_leads_to_the_newest_state_not_after(
    store: str, history: History, capsys: pytest.CaptureFixture[str]
) -> None:
    for text, seq, kind, granularity, exact in (
        (name(history, 7), 7, "intermediary", 0, True),
        (format_instant(history.times_ns[7] + 1), 7, "intermediary", 0, True),
        ("seq-30", 20, "snapshot", 0, False),
        (name(history, 30), 20, "snapshot", 0, False),
        ("latest", 60, "snapshot", 0, True),
        ("start", 0, "snapshot", None, True),
        ("bookmarks/5m-ago", 60, "snapshot", 0, True),
    ):
        assert said(capsys, "resolve", store, text) == name(history, seq) + "\n"
        assert json.loads(said(capsys, "resolve", store, text, "--json")) == {
            "instant": name(history, seq), "seq": seq, "kind": kind, "granularity_ns": granularity, "exact": exact,
        }  # fmt: skip
        said(capsys, "resolve", store, text, "--strict", code=0 if exact else 1)


def test_what_resolve_can_not_answer_is_one_line(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "not a time" in said(capsys, "resolve", store, "rubbish", code=2)
    assert "no state answers" in said(capsys, "resolve", store, "2020-01-01", code=1)
    assert "no state answers" in said(capsys, "resolve", store, "5m-ago", code=1)
    assert "no bookmark" in said(capsys, "resolve", store, "bookmarks/none", code=1)
    assert "time zone" in said(capsys, "resolve", store, "latest", "--tz", "Mars", code=2)
    assert "no such directory" in said(capsys, "resolve", store + "x", "latest", code=2)


def test_list_has_the_keys_of_the_contract(
    store: str, history: History, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(said(capsys, "list", store, "--json"))
    assert found["group"] == history.group
    assert found["protected_through"] == format_instant(history.protected_ns)
    snapshots = [(each["instant"], each["seq"]) for each in found["snapshots"]]
    assert snapshots == [(name(history, seq), seq) for seq in (0, 20, 35, 60)]
    intervals = [(each["from"], each["to"], each["granularity_ns"]) for each in found["intervals"]]
    assert intervals == [
        (name(history, 0), name(history, 20), 0),
        (name(history, 20), name(history, 35), None),
        (name(history, 35), name(history, 60), 0),
    ]
    assert all(each["cause"] for each in found["intervals"])
    assert [(each["name"], each["instant"]) for each in found["bookmarks"]] == [
        ("start", name(history, 0)), ("5m-ago", name(history, 60)),
    ]  # fmt: skip
    assert found["gaps"] == []
    part = json.loads(said(capsys, "list", store, "--from", "seq-20", "--to", "latest", "--json"))
    assert [each["seq"] for each in part["snapshots"]] == [20, 35]
    text = said(capsys, "list", store)
    assert all(name(history, seq) in text for seq in (0, 20, 35, 60)) and "snapshots only" in text


def test_digest_is_that_of_the_image(store: str, history: History, capsys: pytest.CaptureFixture[str]) -> None:
    for seq in (0, 7, 20, 35, 50, 60):
        for index, volume in enumerate(VOLUMES):
            digest = xxh3_128_hexdigest(history.states[seq][index])
            assert said(capsys, "digest", store, f"seq-{seq}", volume.name) == digest + "\n"
    assert json.loads(said(capsys, "digest", store, "seq-7", "data", "--json"))["seq"] == 7
    assert "no volume 'swap'" in said(capsys, "digest", store, "latest", "swap", code=2)


def test_export_writes_the_image_sparse_and_whole(
    store: str, history: History, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.img"
    for seq, more in ((7, ["--verify"]), (60, ["--force"])):
        said(capsys, "export", store, f"seq-{seq}", "root", str(file), *more)
        assert file.read_bytes() == history.states[seq][0]
        assert not list(tmp_path.glob("*.partial"))
    assert file.stat().st_blocks * 512 < file.stat().st_size
    assert "exists" in said(capsys, "export", store, "latest", "root", str(file), code=2)
    with open(file, "r+b"):
        assert "in use" in said(capsys, "export", store, "latest", "root", str(file), "--force", code=2)
    assert file.read_bytes() == history.states[60][0]
    assert "neither a regular file" in said(capsys, "export", store, "latest", "root", str(tmp_path), code=2)


def test_two_exports_to_one_file_do_not_mix(
    store: str, history: History, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first is the test itself, in the middle of its work."""
    file, partial = tmp_path / "out.img", tmp_path / "out.img.partial"
    partial.write_bytes(b"the other's image so far")
    with open(partial, "rb") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        assert "another export" in said(capsys, "export", store, "latest", "root", str(file), code=2)
        assert partial.read_bytes() == b"the other's image so far" and not file.exists()
    said(capsys, "export", store, "latest", "root", str(file))  # what a killed one left isn't in the way
    assert file.read_bytes() == history.states[60][0]
    assert file.stat().st_mode & 0o777 == 0o600
    assert not partial.exists()


def test_an_export_that_ends_while_the_next_one_begins_keeps_its_image(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, partial = tmp_path / "out.img", tmp_path / "out.img.partial"
    partial.write_bytes(b"a whole image")
    real = fcntl.flock

    def ends_before(fd: int, operation: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}") == str(partial):  # not those of the store
            partial.rename(file)
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", ends_before)
    assert "another export" in said(capsys, "export", store, "latest", "root", str(file), code=2)
    assert file.read_bytes() == b"a whole image"


def test_export_does_not_write_through_a_link_left_at_its_partial_file(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / "out.img.partial").symlink_to("mine")
    assert "not a regular file" in said(capsys, "export", store, "latest", "root", str(tmp_path / "out.img"), code=2)
    assert (tmp_path / "mine").read_bytes() == b"mine"


def test_an_error_of_the_disk_names_object_and_byte(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    for command, more in (("digest", []), ("export", [str(tmp_path / "out.img")])):
        said_line = said(capsys, command, store, "start", "root", *more, code=1)
        assert re.search(r"objects/.*snapshot-0{15}1\.blocks: reading at byte 4096: Input/output error", said_line)


def test_a_failed_export_leaves_nothing(
    store: str, history: History, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = object_files(store, "snapshot-*.blocks")[0]
    contents = bytearray(blocks.read_bytes())
    for place in range(4096 + 100, len(contents), 4096):
        contents[place] ^= 1
    blocks.write_bytes(contents)
    assert "damaged" in said(capsys, "export", store, "start", "root", str(tmp_path / "out.img"), code=1)
    assert "damaged" in said(capsys, "digest", store, "start", "root", code=1)
    assert not list(tmp_path.glob("out.img*"))


def test_an_export_that_has_no_room_says_how_much_it_needs(
    store: str, history: History, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "write_all", full)
    image, size = history.states[50][0], VOLUMES[0].block_size
    needed = sum(len(image[at : at + size]) for at in range(0, len(image), size) if any(image[at : at + size]))
    line = said(capsys, "export", store, "seq-50", "root", str(tmp_path / "out.img"), code=1)
    assert f"out.img: No space left on device: the image has {needed} bytes that aren't zeros: write it to an" in line
    assert not list(tmp_path.glob("out.img*"))


@pytest.mark.loop
def test_export_overwrites_a_device_that_is_free_and_large_enough(
    store: str, history: History, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backing = tmp_path / "backing"
    backing.write_bytes(os.urandom(4 << 20))
    small = tmp_path / "small"
    small.write_bytes(bytes(1 << 20))
    devices = [run(["losetup", "--find", "--show", path]).stdout.strip() for path in (backing, small)]
    place = tmp_path / "place"
    place.mkdir()
    try:
        said(capsys, "export", store, "seq-50", "root", devices[0], "--verify")
        with open(devices[0], "rb") as device:
            assert device.read(VOLUMES[0].size_bytes) == history.states[50][0]
        assert "too small" in said(capsys, "export", store, "seq-50", "root", devices[1], code=2)
        run(["mkfs.ext4", "-q", devices[0]])
        run(["mount", devices[0], place])
        try:
            assert "in use" in said(capsys, "export", store, "seq-50", "root", devices[0], code=2)
        finally:
            run(["umount", place])
    finally:
        for device in devices:
            run(["losetup", "--detach", device])
