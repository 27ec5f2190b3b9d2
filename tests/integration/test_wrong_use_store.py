"""`receive`, and the commands on a store: wrong addresses, directories, times and targets, damaged objects."""

from __future__ import annotations

import copy
import os
import shutil
import socket
from pathlib import Path

import pytest
from xxhash import xxh3_128_hexdigest

from pitfs.cli.main import main
from pitfs.model.position import format_instant
from pitfs.model.transfer import VolumeInfo
from pitfs.store.ingest import Ingest
from tests.helpers.hosts import Mount
from tests.helpers.loops import LoopDevice, MountedFilesystem, fill, free_file
from tests.helpers.processes import run
from tests.helpers.refusals import pitfs_refused
from tests.helpers.stores import ingest_transfer, object_files
from tests.helpers.transfers import History

pytestmark = [pytest.mark.timeout(120)]
VOLUMES = (VolumeInfo("root", 2_200_000, 4096), VolumeInfo("data", 12_345, 512))
Said = pytest.CaptureFixture[str]


class Given:
    """A closed store with 25 writes in two intervals, the second of snapshots only, and the model of what is in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.history = History(5, VOLUMES)
        ingest = Ingest(str(root), self.history.hello)
        for count, bookmark in ((0, "start"), (15, ""), (10, "end")):
            for _ in range(count):
                self.history.write()
            granularity_ns, bookmarks = None if count == 10 else 0, [bookmark] if bookmark else []
            ingest_transfer(ingest, self.history.close_interval(granularity_ns, bookmarks))
        ingest.close()
        self.path = root / self.history.group

    def copied_to(self, root: Path) -> Given:
        """The same, to be damaged."""
        given = copy.copy(self)
        shutil.copytree(self.root, root)
        given.root, given.path = root, root / self.path.name
        return given

    def name(self, seq: int) -> str:
        return format_instant(self.history.times_ns[seq])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return Given(tmp_path_factory.mktemp("original") / "stores")


@pytest.fixture
def store(original: Given, tmp_path: Path) -> Given:
    return original.copied_to(tmp_path / "stores")


def say(said: Said, code: int, *words: str, args: list[str | Path]) -> None:
    """`pitfs ARGS` in this process: that exit code and one line with all the words."""
    assert main([str(arg) for arg in args]) == code
    captured = said.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1, captured
    assert captured.err.startswith("pitfs") and "bug in pitfs" not in captured.err
    for word in words:
        assert word in captured.err, (word, captured.err)


# -- receive


def test_a_receiver_that_can_not_be_started_says_why(tmp_path: Path, capsys: Said) -> None:
    (tmp_path / "file").touch()
    root = tmp_path / "stores"
    for code, words, listen, *more in (
        (2, "insecure is for loopback only", "0.0.0.0:0", "--insecure"),
        (2, "insecure is for loopback only", ":0", "--insecure"),
        (2, "HOST:PORT", "here", "--insecure"),
        (2, "with a port from 0 to 65535", "127.0.0.1:70000", "--insecure"),
        (2, "write an IPv6 address in brackets", "::1:7420", "--insecure"),
        (2, "--certificate, --key, --authority missing", "127.0.0.1:0"),
        (2, "--key, --authority missing", "127.0.0.1:0", "--certificate", tmp_path / "file"),
        (2, "--window '1GiB': must be a power of two", "127.0.0.1:0", "--insecure", "--window", "1GiB"),
        (2, "--window 'much' isn't a number with one of", "127.0.0.1:0", "--insecure", "--window", "much"),
        (2, "exclude each other", "127.0.0.1:0", "--insecure", "--key", tmp_path / "file"),
        (2, "isn't a PEM file", "127.0.0.1:0", "--certificate", tmp_path / "file", "--key", tmp_path / "file",
         "--authority", tmp_path / "file"),
        (2, "can't read the certificate", "127.0.0.1:0", "--certificate", tmp_path / "no", "--key",
         tmp_path / "file", "--authority", tmp_path / "file"),
    ):  # fmt: skip
        say(capsys, code, words, args=["receive", "--root", root, "--listen", listen, *more])
    for where, words in ((tmp_path / "file", "isn't a directory"), (Path("/proc/pitfs"), "can't be made")):
        args = ["receive", "--root", where, "--listen", "127.0.0.1:0", "--insecure"]
        say(capsys, 2 if "file" in str(where) else 1, f"{where}: ", words, args=args)
    say(capsys, 2, "--root", args=["receive", "--listen", "127.0.0.1:0", "--insecure"])


def test_an_address_in_use_and_one_of_another_host_are_refused(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        start = ["receive", "--insecure", "--root", tmp_path / "stores", "--listen"]
        pitfs_refused(1, f"127.0.0.1, port {port}: the address is in use", "another `pitfs receive`",
                      args=[*start, f"127.0.0.1:{port}"])  # fmt: skip


def test_a_root_on_a_read_only_filesystem_is_refused(tmp_path: Path, capsys: Said) -> None:
    (tmp_path / "root").mkdir()
    run(["mount", "-t", "tmpfs", "-o", "ro", "none", tmp_path / "root"])
    try:
        for root in (tmp_path / "root", tmp_path / "root" / "stores"):
            args = ["receive", "--root", root, "--listen", "127.0.0.1:0", "--insecure"]
            say(
                capsys,
                1,
                f"{root}: ",
                "Read-only" if root.name == "stores" else "can't be written",
                args=args,
            )
    finally:
        run(["umount", tmp_path / "root"])


def test_a_store_on_a_read_only_filesystem_can_be_read(store: Given, tmp_path: Path, capsys: Said) -> None:
    """The filesystem of the last copy went read-only because of errors, or is a snapshot of it."""
    place = tmp_path / "read-only"
    place.mkdir()
    run(["mount", "--bind", store.root, place])
    try:
        run(["mount", "-o", "remount,bind,ro", place])
        there = place / store.path.name
        assert main(["digest", str(there), "seq-7", "root"]) == 0
        assert capsys.readouterr().out == xxh3_128_hexdigest(store.history.states[7][0]) + "\n"
        (store.path / "catalog.sqlite-wal").write_bytes(b"x" * 100)
        say(capsys, 2, "read-only file system with a log", "catalog.sqlite-wal", "mount it read-write",
            args=["digest", there, "seq-7", "root"])  # fmt: skip
    finally:
        run(["umount", place])


# -- what isn't a store


@pytest.mark.parametrize(
    "command", [["list"], ["status"], ["resolve", "latest"], ["digest", "latest", "root"]]
)
def test_what_is_no_store_is_refused(store: Given, tmp_path: Path, capsys: Said, command: list[str]) -> None:
    name, *more = command

    def refuse(code: int, *words: str, path: Path = store.path) -> None:
        say(capsys, code, *words, args=[name, path, *more])

    refuse(2, "no such", path=tmp_path / "nowhere")
    refuse(
        2,
        f"{store.path.parent}: not a store",
        "there are stores in it: " + store.path.name,
        path=store.path.parent,
    )
    info = store.path / "store.json"
    good = info.read_bytes()
    info.write_bytes(good.replace(b'"version": 2', b'"version": 7'))
    refuse(2, f"{store.path}: store of version 7", "newer pitfs")
    info.write_bytes(good[:40])
    refuse(2, f"{info}: damaged", "put it back")
    info.write_bytes(good)
    catalog = store.path / "catalog.sqlite"
    kept = catalog.read_bytes()
    catalog.write_bytes(b"not a database, whatever its name says" * 200)
    refuse(1, f"{catalog}: damaged", "pitfs check STORE --rebuild")
    catalog.unlink()
    refuse(2, f"{store.path}: not a whole store, it has no catalog.sqlite")
    catalog.write_bytes(kept)
    assert main([name, str(store.path), *more]) == 0


# -- times and names


def test_a_time_that_leads_nowhere_is_refused(store: Given, capsys: Said) -> None:
    can = f"{store.name(0)} (seq 0) through "
    for code, time, *words in (
        (2, "yesterdayish", "is not a time", "nor is there a bookmark"),
        (2, "2026-13-45", "is not a time"),
        (2, "", "time"),
        (2, "seq-", "time"),
        (1, "2000-01-01", "no state answers to '2000-01-01'", can),
        (1, "2999-01-01T00:00:00Z", "no state answers to", can),
        (1, "seq-99999999999999999999999999", "no state answers to", can),
        (2, os.fsdecode(b"\xff"), "is not a time", "nor is there a bookmark"),
        (1, "seq-26", "no state answers to 'seq-26'", can),
        (1, "100000h-ago", can),
        (1, "bookmarks/none", "no bookmark 'none'", "pitfs list"),
    ):
        for command in (["resolve"], ["digest"]):
            more = ["root"] if command == ["digest"] else []
            say(capsys, code, *words, args=[*command, store.path, time, *more])
    assert main(["list", str(store.path), "--from", "1600", "--to", "9999-12-31"]) == 0
    capsys.readouterr()
    say(capsys, 1, "the state at exactly 'seq-20' can't be given", f"before it is {store.name(15)}", "--strict",
        args=["resolve", store.path, "seq-20", "--strict"])  # fmt: skip
    say(capsys, 2, "'Mars'", "Europe/Vienna", args=["resolve", store.path, "latest", "--tz", "Mars"])
    say(
        capsys,
        2,
        f"{store.path}: no volume 'boot': there are root, data",
        args=["digest", store.path, "latest", "boot"],
    )
    say(capsys, 2, "no volume 'boot'", args=["export", store.path, "latest", "boot", store.path / "x"])


@pytest.mark.parametrize("args", [["prune"], ["prune", "--dry-run"], ["retention", "--set", "hourly 0h"]])
def test_retention_that_can_not_be_meant_changes_nothing(store: Given, capsys: Said, args: list[str]) -> None:
    before = sorted(store.path.rglob("*"))
    line = "an age of 0" if len(args) == 3 else f"{store.path}: no policy is set"
    say(capsys, 2, line, args=[args[0], store.path, *args[1:]])
    assert sorted(store.path.rglob("*")) == before


# -- export


def test_an_export_that_can_not_be_leaves_what_is_there(store: Given, tmp_path: Path, capsys: Said) -> None:
    export = ["export", store.path, "latest", "root"]
    (tmp_path / "there").write_text("keep me")
    say(capsys, 2, f"{tmp_path}/there: exists", "--force", args=[*export, tmp_path / "there"])
    assert (tmp_path / "there").read_text() == "keep me"
    say(capsys, 2, f"{tmp_path}: neither a regular file nor a block device", args=[*export, tmp_path])
    say(capsys, 1, f"{tmp_path}/no/x", "No such file", args=[*export, tmp_path / "no" / "x"])
    os.mkfifo(tmp_path / "fifo")
    say(capsys, 2, f"{tmp_path}/fifo: neither", args=[*export, tmp_path / "fifo"])


@pytest.mark.loop
def test_an_export_onto_too_small_mounted_or_full_targets_is_refused(
    store: Given, tmp_path: Path, capsys: Said
) -> None:
    with LoopDevice(free_file(tmp_path / "small", 1 << 20)) as device:
        say(capsys, 2, f"{device}: {1 << 20} bytes, the volume has 2200000: too small",
            args=["export", store.path, "latest", "root", device])  # fmt: skip
        run(["mkfs.ext4", "-q", device])
        with MountedFilesystem(device, tmp_path / "full", "ext4") as full:
            say(capsys, 2, f"{device}: in use", args=["export", store.path, "latest", "data", device])
            fill(full / "ballast")
            say(capsys, 1, f"{full}/x: No space left", args=["export", store.path, "latest", "data", full / "x"])
            assert sorted(os.listdir(full)) == ["ballast", "lost+found"]


# -- damage


def test_damage_in_an_object_is_one_line_with_object_and_offset_and_eio_for_that_range_only(
    store: Given, tmp_path: Path, capsys: Said
) -> None:
    image = store.history.states[25][0]
    flipped = damage(store)
    say(
        capsys,
        1,
        f"{flipped[0]}: damaged at byte {flipped[1]}: ",
        args=["digest", store.path, "latest", "root"],
    )
    target = tmp_path / "image"
    say(capsys, 1, f"{flipped[0]}: damaged at byte", args=["export", store.path, "latest", "root", target])
    assert not target.exists() and not target.with_name("image.partial").exists()
    with Mount(store.path, tmp_path) as mount:
        found, unreadable = read_around_damage(mount.image("latest"))
        lines = mount.complaints()
    assert unreadable and len(unreadable) * 4096 < len(image) // 4
    for start in range(0, len(image), 4096):
        if start not in unreadable:
            assert found[start : start + 4096] == image[start : start + 4096]
    assert any(str(flipped[0]) in line and f"byte {flipped[1]}" in line for line in lines), lines
    assert len(lines) <= 3 * len(unreadable)


def damage(store: Given) -> tuple[Path, int]:
    """Flips a bit in the block of seq 25 that stands first in its snapshot's object; object and block's offset."""
    (path,) = object_files(store.path, f"snapshot-{3:016x}.blocks")
    with path.open("r+b") as file:
        file.seek(4096)
        byte = file.read(1)[0]
        file.seek(4096)
        file.write(bytes([byte ^ 1]))
    return path, 4096


def read_around_damage(image: Path) -> tuple[bytearray, set[int]]:
    """The image as far as it can be read, block by block, past the page cache's readahead; where it can't."""
    found, unreadable = bytearray(image.stat().st_size), set()
    fd = os.open(image, os.O_RDONLY | os.O_DIRECT)
    try:
        for start in range(0, len(found), 4096):
            try:
                data = os.pread(fd, 4096, start)
            except OSError as error:
                assert error.strerror == "Input/output error"
                unreadable.add(start)
            else:
                found[start : start + len(data)] = data
    finally:
        os.close(fd)
    return found, unreadable
