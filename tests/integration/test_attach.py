"""`pitfs attach`, `pitfs detach`, and umount(8) of a mount that a loop device is over."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pitfs.fuse.kernel.loop_devices import sector_size_for
from pitfs.store.store import Store
from tests.helpers.attaching import AFTER, BEFORE, Disks, attached, nothing_left, pitfs
from tests.helpers.documents import commands
from tests.helpers.hosts import Mount
from tests.helpers.loops import LoopDevice, MountedFilesystem, force_unmount, is_mounted
from tests.helpers.processes import ROOT, pids_with, pitfs_command, run, wait_until
from tests.helpers.stores import object_files

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.loop]

MADE = Path("/run/pitfs/attached")


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Disks:
    return Disks(tmp_path_factory.mktemp("disks with blanks"))


@pytest.fixture(scope="class")
def mount(disks: Disks, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    with Mount(disks.path, tmp_path_factory.mktemp("there")) as mount:
        yield mount


@pytest.fixture(autouse=True)
def clean(disks: Disks) -> Iterator[None]:
    with nothing_left(disks.path):
        yield


def made_mounts(disks: Disks) -> list[str]:
    """Places under /run/pitfs/attached where the store is mounted."""
    source = str(disks.path).replace(" ", "\\040")
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line.split()[4] for line in lines if f" - fuse.pitfs {source} " in line and str(MADE) in line]


def test_the_file_in_a_partition_of_then(disks: Disks, tmp_path: Path) -> None:
    device = pitfs("attach", disks.path, disks.before, "disk")
    assert [(each["device"], each["instant"], each["volume"]) for each in attached(disks.path)] == [
        (device, disks.before, "disk")
    ]
    with MountedFilesystem(Path(f"{device}p2"), tmp_path / "then", "ext4", ["ro"]) as then:
        assert (then / "ledger.csv").read_bytes() == BEFORE
        (row,) = attached(disks.path)
        assert row["mountpoints"] == [str(then)]
        assert (row["read_only"], row["scratch"]) == (False, True)
        said = pitfs("detach", device, code=1)
        assert f"mounted on {then}" in said and f"umount {then}" in said
        assert "partition of" in pitfs("detach", f"{device}p2", code=2)
    pitfs("detach", device)
    assert not Path(f"{device}p2").exists()
    assert attached(disks.path) == [] == made_mounts(disks)
    assert "nothing is attached" in pitfs("detach", device, code=1)


@pytest.mark.parametrize("document", ["README", "pitfs-recovery.7"])
def test_the_night_that_everything_went_wrong(disks: Disks, tmp_path: Path, document: str) -> None:
    """From the first attach to the last detach, but for what is run elsewhere; each document in its own order."""
    headings = ("The night",) if document == "README" else ("LOOK INTO IT", "CLEAN UP")
    night = [words for heading in headings for words in commands(heading, document)]
    programs = {"e2fsck", "mkdir", "mount", "ls", "umount"}
    places: dict[str, str | Path] = {"pitfs": pitfs_command()[0], "/srv/pitfs/db1": disks.path, "root": "plain"}
    places |= {"2026-11-22T23:54:07Z": disks.before}
    places |= {f"/mnt/{name}": tmp_path / name for name in ("then", "scratch")}
    done = []
    try:
        for words in night:
            if words[0] not in programs and words[:2] not in (["pitfs", "attach"], ["pitfs", "detach"]):
                continue
            if words[:2] == ["umount", "/srv/db1"] or words[-1] in ("/srv/db1", "/mnt/db1"):
                continue  # the way back through production, and the mount by hand
            ended = run([places.get(word, word) for word in words], accept=(0, 1) if words[0] == "e2fsck" else (0,))
            done.append(words[:2] if words[0] == "pitfs" else words[:1])
            if words[:2] == ["pitfs", "attach"]:
                # Each document says which device it takes to be that: the next command's.
                following = night[night.index(words) + 1]
                (device,) = (word for word in following if word.startswith("/dev/loop"))
                places[device] = ended.stdout.strip()
            if words[0] == "ls":
                assert "ledger.csv" in ended.stdout and (tmp_path / "then" / "ledger.csv").read_bytes() == BEFORE
            if words[0] == "mount" and "-o" not in words:
                place = Path(places[words[-1]])
                (place / "ledger.csv.new").write_bytes(AFTER)
                run(["sync", "--file-system", place])
    finally:
        for name in ("then", "scratch"):
            force_unmount(tmp_path / name)
    assert done.count(["pitfs", "attach"]) == done.count(["pitfs", "detach"]) == (1 if document == "README" else 2)
    assert ["ls"] in done and (["e2fsck"] in done) == (document != "README")
    assert attached(disks.path) == [] == made_mounts(disks)


def test_what_is_written_to_a_scratch_image_is_thrown_away(disks: Disks, tmp_path: Path) -> None:
    before = set(os.listdir("/var/tmp"))
    devices = [pitfs("attach", disks.path, disks.before, "plain", *options) for options in (
        ["--scratch", "--scratch-size", "1MiB"], ["--scratch"], [], ["--plain"])]  # fmt: skip
    assert [(row["read_only"], row["scratch"]) for row in attached(disks.path)].count((False, True)) == 3
    assert len(made_mounts(disks)) == 4
    fd = os.open(devices[0], os.O_RDWR | os.O_DIRECT)
    try:
        page = mmap.mmap(-1, 4096)
        page.write(b"x" * 4096)
        with pytest.raises(OSError) as caught:
            for offset in range(0, 2 << 20, 4096):
                os.pwrite(fd, page, offset)
        assert (caught.value.errno, offset) == (errno.ENOSPC, 1 << 20)
    finally:
        os.close(fd)
    for device in devices[1:]:
        with open(device, "rb") as file:
            assert file.read() == disks.history.states[0][1]
    made = set(os.listdir("/var/tmp")) - before
    assert len([name for name in made if name.startswith("pitfs-scratch.db1.")]) == 3
    for device in devices:
        pitfs("detach", device)
    assert not [name for name in set(os.listdir("/var/tmp")) - before if name.startswith("pitfs-scratch.db1.")]


def test_scratch_goes_where_it_is_told_to_and_nowhere_else(disks: Disks, tmp_path: Path) -> None:
    place = tmp_path / "scratch"
    assert "no such directory" in pitfs("attach", disks.path, "latest", "plain", "--scratch-dir", place, code=2)
    assert "inside the store" in pitfs("attach", disks.path, "latest", "plain", "--scratch-dir", disks.path, code=2)
    both = "attach", disks.path, "latest", "plain", "--plain"
    assert "not allowed with" in pitfs(*both, "--scratch", code=2)
    assert "--plain makes a device that can't be written" in pitfs(*both, "--scratch-dir", tmp_path, code=2)
    assert "scratch_size=much" in pitfs("attach", disks.path, "latest", "plain", "--scratch-size", "much", code=2)
    assert made_mounts(disks) == []
    place.mkdir()
    device = pitfs("attach", disks.path, "latest", "plain", "--scratch-dir", place)
    with open(device, "r+b") as file:
        file.write(b"x")
    pitfs("detach", device)
    assert os.listdir(place) == []


def test_mkfs_on_a_scratch_device_has_nothing_to_complain_of(disks: Disks) -> None:
    device = pitfs("attach", disks.path, "latest", "plain", "--scratch")
    made = run(["mkfs.ext4", "-F", device])
    assert "Creating filesystem" in made.stderr + made.stdout and "Discarding" not in made.stdout
    run(["e2fsck", "-f", "-n", device])
    pitfs("detach", device)


def test_what_a_bare_losetup_leaves_is_in_nobodys_way(disks: Disks, tmp_path: Path) -> None:
    device = pitfs("attach", disks.path, "latest", "plain", "--scratch-dir", tmp_path)
    run(["losetup", "--detach", device])
    assert len(made_mounts(disks)) == 1
    device = pitfs("attach", disks.path, "latest", "plain", "--scratch-dir", tmp_path)  # which only one mount may use
    run(["losetup", "--detach", device])
    assert "nothing is attached there" in pitfs("detach", device, code=1)
    assert made_mounts(disks) == [] == os.listdir(tmp_path)


def test_several_at_once_share_a_mount_and_do_not_trip_over_each_other(disks: Disks) -> None:
    def at_once(commands: list[list[str | Path]]) -> list[str]:
        started = [
            subprocess.Popen([*pitfs_command(), *command], text=True, cwd=ROOT,
                             stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            for command in commands
        ]  # fmt: skip
        said = [process.communicate(timeout=60)[0].strip() for process in started]
        assert [process.returncode for process in started] == [0] * len(commands)
        return said

    instants = (disks.before, "seq-1", "seq-2", "latest")
    devices = at_once([["attach", disks.path, instant, "plain", "--plain"] for instant in instants])
    assert len(set(devices)) == 4 == len(attached(disks.path))
    assert len(made_mounts(disks)) == 1
    pitfs("detach", devices.pop())
    assert len(made_mounts(disks)) == 1
    devices += at_once([["attach", disks.path, instant, "plain"] for instant in instants])
    assert len(made_mounts(disks)) == 5  # a journal is replayed on a scratch of its own
    at_once([["detach", device] for device in devices])
    assert made_mounts(disks) == []


@pytest.mark.usefixtures("mount")
class TestOverAMountThatIsThere:
    def test_a_mount_that_is_there_is_used_and_left_alone(self, disks: Disks, mount: Mount) -> None:
        device = pitfs("attach", disks.path, disks.before, "plain", "--plain")
        (row,) = attached(disks.path)
        assert row["mountpoint"] == str(mount.path) and made_mounts(disks) == []
        pitfs("detach", device)
        assert os.listdir(mount.path)

    def test_all_that_json_says_is_so(self, disks: Disks) -> None:
        said = json.loads(pitfs("attach", disks.path, "latest", "plain", "--plain", "--json"))
        device = said["device"]
        queue = Path("/sys/block") / Path(device).name
        assert (queue / "loop" / "dio").read_text() == "1\n" and said["direct_io"] is True
        assert (queue / "ro").read_text() == "1\n" and said["read_only"] is True
        assert (queue / "queue" / "logical_block_size").read_text() == "512\n" and said["sector_size"] == 512
        assert said["filesystems"] == [{"device": device, "type": "ext4"}] and said["partitions"] == []
        assert (said["instant"], said["seq"], said["volume"]) == (disks.after, 3, "plain")
        with open(device, "rb") as file:
            image = file.read()
        assert len(image) == said["size_bytes"] and image == disks.history.states[3][1]
        assert AFTER in image
        pitfs("detach", device)

    def test_sectors_are_those_that_the_partition_table_was_written_with(self, disks: Disks) -> None:
        assert sector_size_for(bytes(8192)) == 512
        for size in (512, 4096):
            assert sector_size_for(bytes(size) + b"EFI PART" + bytes(8192)) == size
        for options, size in (([], 4096), (["--sector-size", "1024"], 1024)):
            device = pitfs("attach", disks.path, "latest", "wide", *options)
            found = Path(f"/sys/block/{Path(device).name}/queue/logical_block_size").read_text()
            assert int(found) == size
            pitfs("detach", device)

    def test_a_tail_that_fills_no_sector_is_said_to_be_missing(self, disks: Disks) -> None:
        done = run([*pitfs_command(), "attach", disks.path, "latest", "odd"])
        device = done.stdout.strip()
        assert f"the volume's last {10_100 % 512} bytes are missing" in done.stderr
        with open(device, "rb") as file:
            assert file.read() == disks.history.states[3][2][: 10_100 // 512 * 512]
        pitfs("detach", device)

    def test_a_device_that_somebody_reads_stays(self, disks: Disks) -> None:
        device = pitfs("attach", disks.path, disks.before, "plain")
        with open(device, "rb"):
            done = run([*pitfs_command(), "detach", device], accept=(1,))
            assert f"{device}: opened by process {os.getpid()} " in done.stderr
        assert len(attached(disks.path)) == 1
        pitfs("detach", device)

    def test_a_corrupted_block_is_an_error_for_that_range_alone(self, disks: Disks) -> None:
        image = disks.history.images[1]
        place = bytes(image).index(AFTER)
        store = Store.open(str(disks.path))
        try:
            objects = object_files(disks.path, "*.blocks")
        finally:
            store.close()
        (damaged,) = (path for path in objects if path.read_bytes().count(AFTER) and "snapshot" in path.name)
        good = damaged.read_bytes()
        try:
            # One copy may serve both volumes: all that there are.
            damaged.write_bytes(good.replace(AFTER, b"X" + AFTER[1:]))
            device = pitfs("attach", disks.path, "latest", "plain")
            fd = os.open(device, os.O_RDONLY)
            try:
                with pytest.raises(OSError) as caught:
                    os.pread(fd, 4096, place)
                assert caught.value.errno == errno.EIO
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                for start in (0, place - 4096, place + 4096):
                    assert os.pread(fd, 4096, start) == image[start : start + 4096]
            finally:
                os.close(fd)
            pitfs("detach", device)
        finally:
            damaged.write_bytes(good)


def test_what_is_not_ours_is_refused(disks: Disks, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    with LoopDevice(tmp_path / "file") as device:
        assert str(tmp_path / "file") in pitfs("detach", device, code=2)
        assert device.exists() and run(["losetup", "--noheadings", device]).stdout
    for name in ("/dev/null", str(tmp_path / "file"), "x"):
        assert "not a loop device" in pitfs("detach", name, code=2)
    assert "no such device" in pitfs("detach", "/dev/loop98765", code=1)


def test_a_dead_mount_is_in_nobodys_way(disks: Disks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PITFS_TEST_MARK", "attach-dead")
    first = pitfs("attach", disks.path, disks.before, "plain")
    for pid in pids_with("attach-dead"):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not pids_with("attach-dead"), "the daemon is gone")
    second = pitfs("attach", disks.path, disks.before, "plain")
    assert len(made_mounts(disks)) == 2
    with open(second, "rb") as file:
        assert BEFORE in file.read()
    (dead,) = (each["mountpoint"] for each in attached(disks.path) if each["device"] == first)
    run(["umount", "--lazy", dead])  # as mount.pitfs clears one; the device then has no place any more
    listed = run([*pitfs_command(), "attach", "--list"]).stdout
    assert f"{first}  (dead mount)  {disks.before}  plain" in listed
    pitfs("detach", first)
    pitfs("detach", second)
    assert made_mounts(disks) == []


# ------------------------------------------------------------------ failures half-way


@pytest.mark.parametrize(
    ("words", "code"),
    [(["nonsense", "plain"], 2), (["2020-01-01", "plain"], 1), (["latest", "swap"], 2), (["latest"], 2)],
)
def test_what_can_not_be_attached_leaves_nothing(disks: Disks, words: list[str], code: int) -> None:
    pitfs("attach", disks.path, *words, code=code)
    assert made_mounts(disks) == []


def stub(directory: Path, script: str) -> str:
    """A PATH in which losetup is that script."""
    (directory / "losetup").write_text(f"#!/bin/sh\n{script}\n")
    (directory / "losetup").chmod(0o755)
    return f"{directory}:{os.environ['PATH']}"


def test_no_loop_device_free(disks: Disks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "losetup: cannot find an unused loop device: No such device"
    monkeypatch.setenv("PATH", stub(tmp_path, f"echo '{said}' >&2; exit 1"))
    assert "cannot find an unused loop device" in pitfs("attach", disks.path, "latest", "plain", code=1)
    assert made_mounts(disks) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_undoes_what_was_done(disks: Disks, tmp_path: Path, number: signal.Signals) -> None:
    script = f'touch "{tmp_path}/reached"; sleep 0.3; PATH=/sbin:/usr/sbin:$PATH; exec /sbin/losetup "$@"'
    process = subprocess.Popen(
        [*pitfs_command(), "attach", str(disks.path), "latest", "plain"], text=True, cwd=ROOT,
        env=os.environ | {"PATH": stub(tmp_path, script)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_until(lambda: (tmp_path / "reached").exists(), "losetup runs", 20, 0.01)
    process.send_signal(number)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 130
    assert attached(disks.path) == [] == made_mounts(disks)


# ------------------------------------------------------------------ unmount while attached


def test_umount_names_who_holds_the_mount(disks: Disks, tmp_path: Path) -> None:
    """umount(8) itself, in a mount namespace where /sbin has the helpers whether they are installed or not."""
    upper, work, then = (tmp_path / name for name in ("upper", "work", "then"))
    for directory in (upper, work, then):
        directory.mkdir()
    for name in ("mount.pitfs", "umount.pitfs"):
        script = upper / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} -m pitfs.cli.{name.split(".")[0]} "$@"\n')
        script.chmod(0o755)
    place = tmp_path / "a place"
    place.mkdir()
    script = f"""set -e
        sbin=$(realpath /sbin)
        mount -t overlay -o lowerdir=$sbin,upperdir={upper},workdir={work} overlay $sbin
        mount -t tmpfs tmpfs /run/mount
        mount -t pitfs "{disks.path}" "{place}"
        device=$({' '.join(pitfs_command())} attach "{disks.path}" {disks.before} plain --plain 2>/dev/null)
        echo $device
        mount -o ro,noload $device {then}
        umount "{place}" || echo $?
        umount {then}
        cd "{place}/latest"
        umount "{place}" || echo $?
        cd /
        {' '.join(pitfs_command())} detach $device
        umount "{place}"
        mount -t pitfs -o noatime,rw "{disks.path}" "{place}"
        umount "{place}"
        grep -c "a.040place" /run/mount/utab /proc/self/mountinfo || true"""
    done = run(["unshare", "--mount", "sh", "-c", script])
    device, *codes = done.stdout.split()
    assert codes == ["32", "32", "/run/mount/utab:0", "/proc/self/mountinfo:0"]
    first, second, third = done.stderr.splitlines()
    assert third.startswith("mount.pitfs: WARNING: source write-protected, mounted read-only: ")  # none without rw
    image = f"{disks.before}/plain.img"
    who, what = f"{device} ({image}, mounted on {then})", f"umount {then}, then pitfs detach {device}"
    assert first == f"umount: {place}: busy, held by {who}: {what}"
    assert f"{device} ({image}), process " in second and "sh (working directory: " in second
    assert f"pitfs detach {device}, then end the process" in second


def test_umount_names_a_process_that_has_an_image_open(disks: Disks, tmp_path: Path) -> None:
    helper = [sys.executable, "-m", "pitfs.cli.umount"]
    with Mount(disks.path, tmp_path) as mount:
        with open(mount.image("latest", "plain"), "rb"):
            done = run([*helper, mount.path, "-t", "fuse.pitfs"], accept=(32,))
            assert f"process {os.getpid()} " in done.stderr and f"opened: {disks.after}/plain.img" in done.stderr
        wait_until(lambda: run([*helper, mount.path], accept=(0, 32)).returncode == 0, "it is free", 5)
        assert not is_mounted(mount.path)
    with contextlib.suppress(FileNotFoundError):
        assert "helper" not in Path("/run/mount/utab").read_text()
