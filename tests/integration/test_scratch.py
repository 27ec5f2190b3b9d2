"""Writable images, mounted for real: what is written is there, the store and every other mount unchanged."""

from __future__ import annotations

import errno
import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from pitfs.model.position import format_instant
from pitfs.model.transfer import VolumeInfo
from pitfs.store.ingest import Ingest
from tests.helpers.hosts import Mount, digest, xxhsum
from tests.helpers.loops import LoopDevice, MountedFilesystem, free_file, is_mounted
from tests.helpers.processes import pitfs_command, run, wait_until
from tests.helpers.refusals import refused, together
from tests.helpers.stores import ingest_transfer
from tests.helpers.transfers import History

pytestmark = pytest.mark.fuse

VOLUMES = (VolumeInfo("root", 2_200_000, 4096), VolumeInfo("data", 12_345, 512))
SEQ = 7  # an instant between two snapshots


class Stored:
    """A store, and the model of what must be in it."""

    def __init__(self, root: Path) -> None:
        history = History(3, VOLUMES)
        ingest = Ingest(str(root), history.hello)
        for writes in (0, 20, 15):
            for _ in range(writes):
                history.write()
            ingest_transfer(ingest, history.close_interval(0, []))
        ingest.close()
        self.path = root / history.group
        self.states = history.states
        self.instant = format_instant(history.times_ns[SEQ])
        self.time_ns = history.times_ns[SEQ]

    def image(self, volume: int) -> bytes:
        return self.states[SEQ][volume]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return Stored(tmp_path_factory.mktemp("stores"))


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


@pytest.fixture
def mount(stored: Stored, scratch: Path, tmp_path: Path) -> Iterator[Mount]:
    with Mount(stored.path, tmp_path, options=f"scratch={scratch}") as mount:
        yield mount


def write_randomly(image: Path, content: bytearray, seed: int, count: int = 60) -> None:
    """Random writes to the file and to the model of it."""
    chance = random.Random(seed)
    with image.open("r+b", buffering=0) as file:
        for _ in range(count):
            offset = chance.randrange(len(content))
            data = chance.randbytes(
                min(chance.choice((1, 100, 512, 4096, 5000, 200_000)), len(content) - offset)
            )
            file.seek(offset)
            assert file.write(data) == len(data)
            content[offset : offset + len(data)] = data


def test_what_is_written_is_there_and_nothing_else_changes(
    stored: Stored, mount: Mount, scratch: Path, tmp_path: Path
) -> None:
    for index, info in enumerate(VOLUMES):
        image, content = mount.image(stored.instant, info.name), bytearray(stored.image(index))
        assert stat.S_IMODE(image.stat().st_mode) == 0o600
        assert image.stat().st_mtime_ns == stored.time_ns
        write_randomly(image, content, seed=index)
        assert image.read_bytes() == content
        run(["dd", f"if={image}", f"of={tmp_path / 'copy'}", "bs=64k", "iflag=direct"])
        assert (tmp_path / "copy").read_bytes() == content
        assert image.stat().st_mtime_ns > stored.time_ns
    with Mount(stored.path, tmp_path, name="beside") as beside:
        for index, info in enumerate(VOLUMES):
            assert beside.image(stored.instant, info.name).read_bytes() == stored.image(index)
    (tmp_path / "root").write_bytes(stored.image(0))
    assert digest(stored.path, stored.instant) == xxhsum(tmp_path / "root")
    assert os.listdir(scratch) == []
    mount.unmount()
    mount.start()
    assert mount.image(stored.instant).read_bytes() == stored.image(0)


def test_what_was_fsynced_is_found_again_also_after_a_kill(
    stored: Stored, scratch: Path, tmp_path: Path
) -> None:
    content = bytearray(stored.image(0))
    with Mount(stored.path, tmp_path, options=f"scratch={scratch},scratch_keep") as mount:
        image = mount.image(stored.instant)
        write_randomly(image, content, seed=1)
        mount.unmount()  # in order: all of it stays, fsynced or not
        mount.start()
        assert image.read_bytes() == content
        with image.open("r+b", buffering=0) as file:
            write_randomly(image, content, seed=2)
            os.fsync(file.fileno())
        mount.kill()
        mount.start()  # clears the dead mount
        assert image.read_bytes() == content
        mount.unmount()
        kept = sorted(os.listdir(scratch))
        assert [name.split(".", 1)[1] for name in kept] == [f"{SEQ}.root.data", f"{SEQ}.root.index"]
        command = [
            *pitfs_command("mount.pitfs"),
            stored.path,
            mount.path,
            "-o",
            f"scratch={scratch},scratch_keep",
        ]
        index = scratch / kept[1]
        good = index.read_bytes()
        index.write_bytes(good[:130] + b"?" + good[131:])
        refused(command, 1, str(index), "damaged", "remove both files")
        index.write_bytes(good)
        os.rename(scratch / kept[0], scratch / "elsewhere")
        refused(command, 1, kept[0], "missing", "remove both files")
        os.rename(scratch / "elsewhere", scratch / kept[0])
        other = scratch / ("f" * 32 + index.name[32:])
        index.rename(other)
        refused(command, 2, other.name, "another store")
        other.rename(index)
    with Mount(stored.path, tmp_path, options=f"scratch={scratch}") as mount:  # leaves alone what is kept
        assert mount.image(stored.instant).read_bytes() == stored.image(0)
    assert sorted(os.listdir(scratch)) == kept


def test_what_was_fsynced_survives_a_power_cut(stored: Stored, scratch: Path, tmp_path: Path) -> None:
    """The scratch's filesystem is shut down without writing anything back: what was synced stays, the rest is lost."""
    run(["mkfs.ext4", "-q", free_file(tmp_path / "disk", 32 << 20)])
    content = bytearray(stored.image(0))
    with LoopDevice(tmp_path / "disk") as device:
        with (
            MountedFilesystem(device, scratch, "ext4"),
            Mount(stored.path, tmp_path, options=f"scratch={scratch},scratch_keep") as mount,
        ):
            image = mount.image(stored.instant)
            with image.open("r+b", buffering=0) as file:
                for seed in (1, 2):
                    write_randomly(image, content, seed, 30)
                    os.fsync(file.fileno())
                synced = bytes(content)
                write_randomly(image, content, seed=3, count=10)
            run(["xfs_io", "-x", "-c", "shutdown", scratch])
            mount.kill()
        with (
            MountedFilesystem(device, scratch, "ext4"),
            Mount(stored.path, tmp_path, options=f"scratch={scratch},scratch_keep") as mount,
        ):
            found = mount.image(stored.instant).read_bytes()
    assert len(found) == len(synced)
    for offset in range(0, len(found), 4096):
        block = found[offset : offset + 4096]
        # Of the last writes a block may have several, one behind the other; those that it hasn't are as they were.
        if synced[offset : offset + 4096] == content[offset : offset + 4096]:
            assert block == synced[offset : offset + 4096], offset


def test_a_full_scratch_refuses_new_blocks_alone(stored: Stored, scratch: Path, tmp_path: Path) -> None:
    with Mount(stored.path, tmp_path, options=f"scratch={scratch},scratch_size=64KiB") as mount:
        image, other = mount.image(stored.instant), mount.image(stored.instant, "data")
        content = bytearray(stored.image(0))
        assert os.statvfs(image).f_bavail * os.statvfs(image).f_frsize == 65536
        with image.open("r+b", buffering=0) as file:
            file.write(b"x" * 65536)
            content[:65536] = b"x" * 65536
            with pytest.raises(OSError) as caught:
                os.pwrite(file.fileno(), b"y", 70_000)
            assert caught.value.errno == errno.ENOSPC
            os.pwrite(file.fileno(), b"z" * 5000, 10)  # is there already
            content[10:5010] = b"z" * 5000
            os.fsync(file.fileno())
        assert os.statvfs(image).f_bavail == 0
        assert image.read_bytes() == content
        assert other.read_bytes() == stored.image(1)
        assert "the scratch is full" in mount.logged()


def test_a_full_disk_refuses_the_writer_alone(stored: Stored, scratch: Path, tmp_path: Path) -> None:
    run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", scratch])
    try:
        with Mount(stored.path, tmp_path, options=f"scratch={scratch},scratch_keep") as mount:
            image, content = mount.image(stored.instant), bytearray(stored.image(0))
            with image.open("r+b", buffering=0) as file:
                with pytest.raises(OSError) as caught:
                    for offset in range(0, len(content), 8192):
                        os.pwrite(file.fileno(), b"w" * 4096, offset)
                        content[offset : offset + 4096] = b"w" * 4096
                assert caught.value.errno == errno.ENOSPC
            assert image.read_bytes() == content != stored.image(0)
            assert mount.image(stored.instant, "data").read_bytes() == stored.image(1)
            mount.unmount()  # and what had room is kept, though nothing was synced
            mount.start()
            assert image.read_bytes() == content
    finally:
        run(["umount", scratch])


def test_an_image_keeps_its_size_and_its_owner_and_the_tree_stays(stored: Stored, mount: Mount) -> None:
    image = mount.image(stored.instant)
    for attempt in (
        lambda: os.truncate(image, 100),
        lambda: os.truncate(image, len(stored.image(0)) + 1),
        lambda: image.open("wb"),  # truncates
        lambda: os.chmod(image, 0o777),
        lambda: os.chown(image, 1, 1),
        lambda: image.unlink(),
        lambda: (image.parent / "new").touch(),
        lambda: (mount.path / "new").mkdir(),
        lambda: image.rename(image.parent / "new"),
    ):
        with pytest.raises(OSError) as caught:
            attempt()
        assert caught.value.errno == errno.EPERM
    os.truncate(image, len(stored.image(0)))
    os.utime(image)
    with image.open("r+b", buffering=0) as file:
        file.seek(0, os.SEEK_END)
        with pytest.raises(OSError) as caught:
            file.write(b"x")
        assert caught.value.errno == errno.ENOSPC
    assert image.read_bytes() == stored.image(0)
    assert os.getxattr(image, "user.pitfs.seq") == str(SEQ).encode()
    run(["dd", "if=/dev/zero", f"of={image}", "bs=4096", "count=2", "conv=notrunc,fsync"])
    assert image.read_bytes() == bytes(8192) + stored.image(0)[8192:]
    assert os.getxattr(image, "user.pitfs.seq") == str(SEQ).encode()


def test_the_mount_ends_with_the_process_that_had_what_was_written(stored: Stored, mount: Mount) -> None:
    """Were it replaced by another, images would go back to what they were, under who uses them."""
    with mount.image(stored.instant).open("r+b", buffering=0) as file:
        file.write(b"x" * 8192)
    _, worker = mount.pids()
    os.kill(worker, 9)
    wait_until(lambda: not mount.pids() and not is_mounted(mount.path), "the mount has ended")
    assert "ended by SIGKILL" in mount.logged() and "Traceback" not in mount.logged()


def test_wrong_use_is_refused_with_one_line(
    stored: Stored, mount: Mount, scratch: Path, tmp_path: Path
) -> None:
    place, free = tmp_path / "place", tmp_path / "free"
    for directory in (place, free, place / "inside"):
        directory.mkdir()
    (tmp_path / "file").touch()

    def attempt(options: str, *words: str) -> None:
        refused([*pitfs_command("mount.pitfs"), stored.path, place, "-o", options], 2, *words)

    together(
        lambda: attempt(f"scratch={scratch}", str(scratch), "another mount uses it"),
        lambda: attempt(f"scratch={stored.path}", "inside the store"),
        lambda: attempt(f"scratch={stored.path / 'objects'}", "inside the store"),
        lambda: attempt(f"scratch={stored.path.parent}", "lies inside: choose"),
        lambda: attempt(f"scratch={place}", "inside the mountpoint"),
        lambda: attempt(f"scratch={place / 'inside'}", "inside the mountpoint"),
        lambda: attempt(f"scratch={tmp_path / 'missing'}", "no such directory", "mkdir"),
        lambda: attempt(f"scratch={tmp_path / 'file'}", "no such directory"),
        lambda: attempt(f"scratch={free},ro", "ro", "contradict"),
        lambda: attempt(f"scratch={free},workers=2", "workers"),
        lambda: attempt("scratch=", "give a directory"),
        lambda: attempt("scratch_keep", "goes with scratch=DIR"),
        lambda: attempt("scratch_size=1GiB", "goes with scratch=DIR"),
        lambda: attempt(f"scratch={free},scratch_size=much", "scratch_size=much", "10GiB"),
        lambda: attempt(f"scratch={free},scratch_size=0", "scratch_size=0"),
        lambda: attempt(f"scratch={free},scratch_size=10", "10 bytes", "10GiB"),
    )
    assert not is_mounted(place) and os.listdir(free) == []
