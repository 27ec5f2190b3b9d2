"""`pitfs drill`: good and bad instants, as cron runs it, with a COMMAND; and that nothing of it stays."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pitfs.cli.main import main
from tests.helpers.attaching import AFTER, Disks, attached, nothing_left, pitfs
from tests.helpers.broken_disks import BrokenDisk, broken_disk, received
from tests.helpers.filesystems import MAKE
from tests.helpers.loops import LoopDevice, MountedFilesystem, free_file
from tests.helpers.processes import MARK, pids_with, pitfs_command, run, wait_until

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.loop]

MIB = 1 << 20


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> BrokenDisk:
    return broken_disk(tmp_path_factory.mktemp("broken"), last=400, filesystem=200, database=300)


@pytest.fixture(autouse=True)
def clean(disk: BrokenDisk) -> Iterator[None]:
    with nothing_left(disk.path):
        yield


def drill(*words: str | Path, code: int | None = 0) -> tuple[list[str], str]:
    """Runs it as cron does: no terminal, a short PATH, / as working directory. Its lines, and standard error."""
    done = subprocess.run(
        [*pitfs_command(), "drill", *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        env={"PATH": "/usr/bin:/bin", MARK: "drill"}, cwd="/", timeout=60,
    )  # fmt: skip
    assert code is None or done.returncode == code, done.stderr
    return done.stdout.splitlines(), done.stderr


def test_a_sound_instant_is_one_line_and_nothing_else(disk: BrokenDisk) -> None:
    (line,), said = drill(disk.path, "--at", "seq-199")
    assert line.startswith(f"{disk.instant(199)}  root  ext4  ok  ") and line.endswith(" s")
    assert said == ""


def test_a_damaged_one_fails_and_the_check_says_why(disk: BrokenDisk) -> None:
    (line,), said = drill(disk.path, "--at", "seq-200", code=1)
    assert line.startswith(f"{disk.instant(200)}  root  ext4  FAILED: e2fsck -f -n ended with 4  ")
    assert "Entry 'ledger' in / (2) has deleted/unused inode" in said


def test_a_random_instant_is_one_that_can_be_reached(disk: BrokenDisk) -> None:
    lines, _ = drill(disk.path, "--json", code=None)
    (row,) = json.loads("\n".join(lines))
    assert row["instant"] == disk.instant(row["seq"]) and (row["volume"], row["filesystems"]) == ("root", ["ext4"])
    assert row["ok"] == (row["seq"] < 200) and bool(row["problem"]) != row["ok"]


def test_a_command_of_ones_own(disk: BrokenDisk, tmp_path: Path) -> None:
    script = f'echo "$1 $2 $PITFS_DEVICE $PITFS_INSTANT" >{tmp_path}/seen; echo x >"$2"; echo well'
    (line,), said = drill(disk.path, "--at", "seq-7", "--", "sh", "-c", script, "sh", "--")
    assert line.startswith(f"{disk.instant(7)}  root  ext4  ok  ") and said == ""
    dashes, device, same, instant = (tmp_path / "seen").read_text().split()
    assert (dashes, instant) == ("--", disk.instant(7)) and device == same and device.startswith("/dev/loop")
    (line,), said = drill(disk.path, "--at", "seq-7", "--", "sh", "-c", "echo unwell; exit 3", code=1)
    assert "FAILED: sh ended with 3" in line and said == "unwell\n"
    (line,), _ = drill(disk.path, "--at", "seq-7", "--", "sh", "-c", "kill -SEGV $$", code=1)
    assert "FAILED: sh ended by signal 11" in line


def test_what_a_command_leaves_mounted_is_unmounted(disk: BrokenDisk, tmp_path: Path) -> None:
    drill(disk.path, "--at", "seq-7", "--", "sh", "-c", f'mount -o ro "$0" {tmp_path} && test -s {tmp_path}/ledger')
    assert os.listdir(tmp_path) == []


def test_who_uses_what_a_command_left_is_named(disk: BrokenDisk, tmp_path: Path) -> None:
    place, pid = tmp_path / "place", tmp_path / "pid"
    place.mkdir()
    service = f"cd {place}; echo $$ >{pid}; exec sleep 95 >/dev/null 2>&1"
    script = f'mount "$1" {place}; setsid sh -c "$0" & while ! test -s {pid}; do :; done'
    try:
        _, said = drill(disk.path, "--at", "seq-7", "--", "sh", "-c", script, service, code=1)
        assert f"mounted on {place}: unmount first: umount {place}" in said
    finally:
        os.kill(int(pid.read_text()), signal.SIGKILL)
        wait_until(lambda: run(["umount", place], accept=(0, 32)).returncode == 0, "it can be unmounted")
        for each in attached(disk.path):
            pitfs("detach", each["device"])


def test_a_command_that_hangs_is_ended(disk: BrokenDisk) -> None:
    script = "sleep 98 & wait"
    (line,), _ = drill(disk.path, "--at", "seq-7", "--timeout", "1s", "--", "sh", "-c", script, code=1)
    assert "FAILED: sh was ended after 1.0 s (--timeout)" in line
    assert pids_with("drill") == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_and_leaves_nothing(disk: BrokenDisk, tmp_path: Path, number: signal.Signals) -> None:
    script = f"touch {tmp_path}/reached; sleep 97 & wait"
    process = subprocess.Popen(
        [*pitfs_command(), "drill", disk.path, "--at", "seq-7", "--", "sh", "-c", script],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {MARK: "drill"},
    )  # fmt: skip
    wait_until(lambda: (tmp_path / "reached").exists(), "COMMAND runs", 20, 0.01)
    process.send_signal(number)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 130
    assert attached(disk.path) == []
    assert pids_with("drill") == []


def test_volumes_with_partitions_and_without_filesystems(tmp_path: Path) -> None:
    disks = Disks(tmp_path)
    with nothing_left(disks.path):
        lines, said = drill(disks.path, "--at", "latest", code=1)
        assert [line.split()[1:4] for line in lines[:2]] == [["disk", "ext4", "ok"], ["plain", "ext4", "ok"]]
        for line, name in zip(lines[2:], ("odd", "wide"), strict=True):
            assert f"{name}  -  FAILED: no filesystem that pitfs has a check for: give a COMMAND behind --" in line
        assert said == "" and {line.split()[0] for line in lines} == {disks.after}
        (line,), _ = drill(disks.path, "--at", "latest", "--volume", "odd", "--", "cmp", "--bytes=4096", "/dev/zero")
        assert f"{disks.after}  odd  -  ok  " in line
        assert AFTER in bytes(disks.history.images[1])


def test_filesystems_that_were_in_use(tmp_path: Path) -> None:
    """With a journal to be replayed, and a file that was deleted while open: no damage. With damage: damage."""
    sizes = {"ext4": 32 * MIB, "xfs": 300 * MIB, "btrfs": 114 * MIB}
    images = {}
    for kind, size in sizes.items():
        live, images[kind] = free_file(tmp_path / f"{kind}.live", size), tmp_path / f"{kind}.img"
        run([*MAKE[kind], live])
        with (
            LoopDevice(live) as device,
            MountedFilesystem(device, tmp_path / "mounted", kind) as directory,
            open(directory / "gone", "wb") as file,
        ):
            file.write(bytes(MIB))
            os.fsync(file.fileno())
            os.unlink(directory / "gone")
            (directory / "file").write_bytes(random.Random(1).randbytes(MIB))
            run(["sync", "-f", directory])
            shutil.copyfile(live, images[kind])
    images["damaged"] = tmp_path / "xfs.live"  # which was unmounted: no journal mends it
    with images["damaged"].open("r+b") as file:
        head = file.read(MIB)
        file.seek(head.index(b"XAGI") + 16)  # how many inodes there are
        file.write(b"\xff" * 4)
    with received(tmp_path, images):
        pass
    with nothing_left(tmp_path / "db1"):
        lines, said = drill(tmp_path / "db1", code=1)
        assert [line.split()[1:4] for line in lines[:3]] == [[kind, kind, "ok"] for kind in sizes], said
        assert lines[3].split()[1:4] == ["damaged", "xfs", "FAILED:"] and "needs cleaning" in said


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--volume", "swap"], 2, "no volume 'swap': there are root"),
        (["--at", "2020-01-01"], 1, "no state answers to '2020-01-01'"),
        (["--timeout", "soon"], 2, "--timeout 'soon' isn't a number"),
        (["--scratch-dir", "a,b"], 2, "a,b: holds a comma"),
        (["5m-ago"], 2, "unrecognized arguments: 5m-ago"),
        (["--", "/no/such"], 2, "/no/such: can't be run: No such file or directory"),
    ],
)
def test_wrong_use(disk: BrokenDisk, words: list[str], code: int, message: str) -> None:
    assert message in pitfs("drill", disk.path, *words, code=code)


def test_an_empty_store_has_nothing_to_drill(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    assert main(["drill", str(tmp_path / "x")]) == 2
