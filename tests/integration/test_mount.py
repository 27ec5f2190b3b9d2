"""A store mounted for real: what is seen equals the model, at every instant, from outside."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyfuse3
import pytest
import trio
import trio.testing

from pitfs.fuse.kernel.mountinfo import is_dead
from pitfs.fuse.replica import Ownership
from pitfs.fuse.replica import Replica as Handlers
from pitfs.model.position import format_instant
from pitfs.model.transfer import VolumeInfo
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.ingest import Ingest
from pitfs.store.objects.pool import ObjectPool
from pitfs.store.store import Store
from pitfs.view.tree import Tree
from tests.helpers.hosts import Mount
from tests.helpers.loops import force_unmount, is_mounted
from tests.helpers.processes import pitfs_command, run, wait_until
from tests.helpers.stores import ingest_transfer, object_files
from tests.helpers.transfers import History

pytestmark = pytest.mark.fuse

VOLUMES = (VolumeInfo("root", 2_200_000, 4096), VolumeInfo("data", 12_345, 512))


class Replica:
    """A store and the model of what must be in it."""

    def __init__(self, root: Path) -> None:
        self.history = History(3, VOLUMES)
        self.ingest = Ingest(str(root), self.history.hello)
        self.path = root / self.history.group
        self.add(0, bookmark="start")
        self.add(20)
        self.add(15, granularity_ns=None)
        self.add(25, bookmark="before-upgrade")

    def add(self, writes: int, granularity_ns: int | None = 0, bookmark: str = "") -> None:
        for _ in range(writes):
            self.history.write()
        transfer = self.history.close_interval(granularity_ns, [bookmark] if bookmark else [])
        ingest_transfer(self.ingest, transfer)

    def name(self, seq: int) -> str:
        return format_instant(self.history.times_ns[seq])

    @property
    def last_seq(self) -> int:
        return len(self.history.times_ns) - 1


@pytest.fixture
def replica(tmp_path: Path) -> Iterator[Replica]:
    replica = Replica(tmp_path)
    yield replica
    replica.ingest.close()


@pytest.fixture
def mount(replica: Replica, tmp_path: Path) -> Iterator[Mount]:
    with Mount(replica.path, tmp_path) as mount:
        yield mount


def helper(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [*pitfs_command("mount.pitfs"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)


def test_every_reachable_instant_is_exactly_the_model(replica: Replica, mount: Mount, tmp_path: Path) -> None:
    for seq in range(replica.last_seq + 1):
        for index, volume in enumerate(VOLUMES):
            image = mount.path / replica.name(seq) / f"{volume.name}.img"
            if seq not in replica.history.reachable:
                assert image.parent.is_symlink()
                continue
            run(["cp", image, tmp_path / "copy"])
            assert (tmp_path / "copy").read_bytes() == replica.history.states[seq][index]
            found = image.stat()
            assert (found.st_size, found.st_mtime_ns) == (volume.size_bytes, replica.history.times_ns[seq])
            assert stat.S_IMODE(found.st_mode) == 0o400 and found.st_uid == 0


def test_ls_shows_the_tree_of_the_contract(replica: Replica, mount: Mount) -> None:
    snapshots = [replica.name(seq) for seq in (0, 20, 35, 60)]
    assert run(["ls", mount.path]).stdout.split() == [*snapshots, "bookmarks", "latest", "times"]
    assert run(["ls", mount.path / snapshots[1]]).stdout.split() == ["data.img", "root.img"]
    assert os.readlink(mount.path / "latest") == snapshots[3]
    assert os.readlink(mount.path / "bookmarks" / "before-upgrade") == "../" + snapshots[3]
    found = run(["find", mount.path, "-mindepth", "1", "-xtype", "f"]).stdout.split()
    assert len(found) == 2 * len(snapshots)
    links = list((mount.path / "times").glob("*/*/*"))
    assert links and all(os.readlink(link).startswith("../../../2025") for link in links)
    assert links[-1].resolve() == mount.path / snapshots[3]
    assert (links[-1] / "data.img").read_bytes() == replica.history.states[60][1]


def test_other_ways_to_say_a_time_are_links(replica: Replica, mount: Mount) -> None:
    time_ns = replica.history.times_ns[7]
    seconds, rest = divmod(time_ns, 10**9)
    for name in (f"@{seconds}.{rest:09d}", "seq-7", replica.name(7).replace("T", " ").rstrip("Z")):
        assert os.readlink(mount.path / name) == replica.name(7)
    assert os.readlink(mount.path / format_instant(time_ns + 1)) == replica.name(7)
    assert os.readlink(mount.path / "seq-30") == replica.name(20)
    for name in (b"nothing", b"\xff", b"x" * 255, b"seq-61", b"2020-01-01", b"1h-ago"):
        with pytest.raises(OSError, match="No such file"):
            os.lstat(os.fsencode(mount.path) + b"/" + name)


def test_images_and_directories_say_what_they_are(replica: Replica, mount: Mount) -> None:
    for seq, kind, granularity in ((0, b"snapshot", b"null"), (7, b"intermediary", b"0"), (35, b"snapshot", b"null")):
        for path in (mount.path / replica.name(seq), mount.path / replica.name(seq) / "data.img"):
            assert {name: os.getxattr(path, name) for name in os.listxattr(path)} == {
                "user.pitfs.seq": b"%d" % seq,
                "user.pitfs.time": replica.name(seq).encode(),
                "user.pitfs.kind": kind,
                "user.pitfs.granularity": granularity,
            }
    with pytest.raises(OSError) as caught:
        os.getxattr(mount.path / replica.name(0), "user.pitfs.nothing")
    for name in ("security.selinux", "system.posix_acl_access"):
        with pytest.raises(OSError, match="not supported"):  # so that ls -l asks once, not for each entry
            os.getxattr(mount.path / replica.name(0), name)
    assert caught.value.errno == errno.ENODATA


def test_nothing_can_be_written(replica: Replica, mount: Mount) -> None:
    image = mount.path / "latest" / "root.img"
    for attempt in (
        lambda: os.open(image, os.O_RDWR),
        lambda: os.open(image, os.O_RDONLY | os.O_TRUNC),
        lambda: os.truncate(image, 0),
        lambda: os.unlink(image),
        lambda: os.mkdir(mount.path / "new"),
        lambda: os.setxattr(image, "user.x", b"1"),
        lambda: os.rename(mount.path / "latest", mount.path / "other"),
    ):
        with pytest.raises(OSError) as caught:
            attempt()
        assert caught.value.errno == errno.EROFS


def test_new_points_appear_without_mounting_again(replica: Replica, mount: Mount) -> None:
    before = os.readlink(mount.path / "latest")
    os.listdir(mount.path)
    with pytest.raises(FileNotFoundError):
        os.stat(mount.path / "seq-65")
    with (mount.path / "latest" / "root.img").open("rb") as image:
        image.read(100)
        replica.add(10, bookmark="later")
        assert image.read() == replica.history.states[60][0][100:]
    assert os.readlink(mount.path / "latest") == replica.name(70) != before
    assert replica.name(70) in os.listdir(mount.path)
    assert "later" in os.listdir(mount.path / "bookmarks")
    assert (mount.path / "seq-65" / "root.img").read_bytes() == replica.history.states[65][0]


def test_mapped_and_unaligned_reads_are_the_image_too(replica: Replica, mount: Mount) -> None:
    expected = replica.history.states[13][0]
    with (mount.path / replica.name(13) / "root.img").open("rb", buffering=0) as file:
        for offset, size in ((0, 1), (4095, 2), (511, 70_000), (len(expected) - 5, 100), (len(expected), 10)):
            assert os.pread(file.fileno(), size, offset) == expected[offset : offset + size]


@pytest.mark.loop
def test_an_image_attaches_as_a_loop_device(replica: Replica, mount: Mount) -> None:
    image = mount.path / replica.name(13) / "root.img"
    device = run(["losetup", "--read-only", "--direct-io=on", "--find", "--show", image]).stdout.strip()
    try:
        expected = replica.history.states[13][0]
        whole = len(expected) // 512 * 512
        assert Path(device).read_bytes() == expected[:whole]
    finally:
        run(["losetup", "--detach", device])


def test_the_readahead_is_raised(mount: Mount) -> None:
    device = mount.path.stat().st_dev
    path = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    assert int(path.read_text()) >= 1024


def test_umount_ends_the_daemon_and_sigterm_unmounts(replica: Replica, tmp_path: Path) -> None:
    with Mount(replica.path, tmp_path) as mount:
        pids = mount.pids()
        mount.unmount()
        mount.start()
        assert not set(pids) & set(mount.pids())
        os.kill(mount.supervisor(), signal.SIGTERM)
        wait_until(lambda: not is_mounted(mount.path), "SIGTERM unmounts", 10)
        wait_until(lambda: not mount.pids(), "the daemon ends", 10)
        assert mount.complaints() == []


def test_a_killed_daemons_mount_is_cleared_and_mounted_anew(replica: Replica, mount: Mount) -> None:
    os.kill(mount.supervisor(), signal.SIGKILL)
    wait_until(lambda: not mount.pids(), "the workers end with the supervisor", 10)
    # A process that is gone from /proc's tables may still be closing its descriptors.
    wait_until(lambda: is_dead(str(mount.path)), "the mount is dead", 10)
    mount.start()
    assert (mount.path / "latest" / "data.img").read_bytes() == replica.history.states[60][1]
    assert mount.complaints() == [f"mount.pitfs: {mount.path}: cleared a dead mount of this store"]


def test_somebody_elses_dead_mount_is_left_alone(replica: Replica, mount: Mount, tmp_path: Path) -> None:
    other = Replica(tmp_path / "other")
    other.ingest.close()
    mount.kill()
    done = helper(other.path, mount.path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and f"umount -l {mount.path}" in done.stderr
    assert is_mounted(mount.path)


def test_what_can_not_be_mounted_is_said_in_one_line(replica: Replica, mount: Mount, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "no-store").mkdir()
    for code, words, arguments in (
        (1, "already mounted", (replica.path, mount.path)),
        (2, "no such directory", (replica.path, tmp_path / "missing")),
        (2, "not a directory", (replica.path, tmp_path / "file")),
        (2, "lies inside", (replica.path, tmp_path)),
        (2, "lies inside", (replica.path, replica.path / "objects")),
        (2, "not a store", (tmp_path / "no-store", tmp_path / "empty")),
        (2, "lies inside", (replica.path, replica.path)),
        (2, "no such directory", (tmp_path / "nowhere", tmp_path / "empty")),
        (2, "unknown option", (replica.path, tmp_path / "empty", "-o", "ro,colour=red")),
        (2, "uid=nobody-at-all", (replica.path, tmp_path / "empty", "-o", "uid=nobody-at-all")),
        (2, "mode=99", (replica.path, tmp_path / "empty", "-o", "mode=99")),
        (2, "time zone", (replica.path, tmp_path / "empty", "-o", "tz=Mars/Olympus")),
        (2, "workers=0", (replica.path, tmp_path / "empty", "-o", "workers=0")),
        (2, "auto_unmount", (replica.path, tmp_path / "empty", "-o", "auto_unmount")),
        (2, "required", (replica.path,)),
    ):
        done = helper(*arguments)
        assert (done.returncode, done.stdout) == (code, ""), done
        assert done.stderr.count("\n") == 1 and words in done.stderr, done.stderr
    assert not is_mounted(tmp_path / "empty")
    assert (mount.path / "latest" / "data.img").read_bytes() == replica.history.states[60][1]


def test_options_of_fstab_are_understood(replica: Replica, tmp_path: Path) -> None:
    options = "rw,noauto,nofail,_netdev,user,x-systemd.automount,relatime,noatime,nodev,comment=x,defaults"
    with Mount(replica.path, tmp_path, options=options) as mount:
        assert os.readlink(mount.path / "latest")


def test_owner_and_mode_are_those_of_the_options(replica: Replica, tmp_path: Path) -> None:
    # where others may reach it
    for directory in (tmp_path, *list(tmp_path.parents)[:-2]):
        directory.chmod(0o755)
    with Mount(replica.path, tmp_path, options="uid=1234,gid=4321,mode=0660") as mount:
        found = (mount.path / "latest" / "root.img").stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 4321, 0o440)
        assert stat.S_IMODE(mount.path.stat().st_mode) == 0o550
        for user, group, allowed in ((1234, 1, True), (1, 4321, True), (1, 1, False)):
            done = subprocess.run(
                ["cat", mount.path / "latest" / "data.img"],
                user=user, group=group, extra_groups=[], capture_output=True,
                check=False,
            )  # fmt: skip
            assert (done.returncode == 0) is allowed, (user, group)


def test_others_may_not_read_by_default_nor_with_allow_other(replica: Replica, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for options in ("", "allow_other"):
        with Mount(replica.path, tmp_path, options=options) as mount:
            for path in (mount.path, mount.path / "latest" / "data.img"):
                done = subprocess.run(["ls", path], user=1, group=1, extra_groups=[], capture_output=True, check=False)
                assert b"Permission denied" in done.stderr


def test_strict_and_tz(replica: Replica, tmp_path: Path) -> None:
    with Mount(replica.path, tmp_path, options="strict,tz=Europe/Vienna") as mount:
        assert os.readlink(mount.path / "2025-11-23T00:54:00") == replica.name(0)
        assert os.readlink(mount.path / format_instant(replica.history.times_ns[7] + 1)) == replica.name(7)
        for name in ("seq-30", replica.name(30)):
            with pytest.raises(FileNotFoundError):
                os.lstat(mount.path / name)


def test_the_foreground_serves_until_the_signal(replica: Replica, tmp_path: Path) -> None:
    place = tmp_path / "front"
    place.mkdir()
    process = subprocess.Popen(
        [*pitfs_command("mount.pitfs"), replica.path, place, "-f"], stderr=subprocess.PIPE, text=True
    )
    try:
        wait_until(lambda: is_mounted(place), "it is mounted", 20)
        assert (place / "latest" / "data.img").read_bytes() == replica.history.states[60][1]
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stderr is not None and process.stderr.read() == ""
    finally:
        process.kill()
        process.communicate()
        force_unmount(place)


def test_ctrl_c_before_the_mount_answers_leaves_none(replica: Replica, tmp_path: Path) -> None:
    place = tmp_path / "interrupted"
    place.mkdir()
    process = subprocess.Popen([*pitfs_command("mount.pitfs"), replica.path, place])
    try:
        wait_until(lambda: is_mounted(place), "it is mounted", 20)
        process.send_signal(signal.SIGINT)
        assert (process.wait(20), is_mounted(place)) in ((130, False), (0, True))  # or it came too late
    finally:
        process.kill()
        process.wait()
        force_unmount(place)


def test_callers_pipes_are_let_go(replica: Replica, tmp_path: Path) -> None:
    place = tmp_path / "piped"
    place.mkdir()
    try:
        begun = time.monotonic()
        done = helper(replica.path, place)  # reads both pipes to their end
        assert done.returncode == 0 and time.monotonic() - begun < 20
        assert is_mounted(place)
    finally:
        force_unmount(place)
    wait_until(lambda: not is_mounted(place), "unmounted", 10)


def test_damage_is_eio_for_its_range_and_a_line_in_the_log(replica: Replica, mount: Mount) -> None:
    image = mount.path / replica.name(60) / "root.img"
    expected = replica.history.states[60][0]
    objects = object_files(replica.path, "snapshot-*1.blocks")
    contents = bytearray(objects[0].read_bytes())
    block = next(b for b in range(len(expected) // 4096) if contents.count(expected[b * 4096 : b * 4096 + 4096]) == 1
                 and any(expected[b * 4096 : b * 4096 + 4096]))  # fmt: skip
    place = contents.index(expected[block * 4096 : block * 4096 + 4096])
    with objects[0].open("r+b") as file:
        file.seek(place + 5)
        file.write(bytes([contents[place + 5] ^ 1]))
    with image.open("rb", buffering=0) as reader:
        with pytest.raises(OSError) as caught:
            os.pread(reader.fileno(), 4096, block * 4096)
        assert caught.value.errno == errno.EIO
        other = block + 1 if (block + 2) * 4096 < len(expected) else block - 1
        assert os.pread(reader.fileno(), 4096, other * 4096) == expected[other * 4096 : other * 4096 + 4096]
    assert any(objects[0].name in line and f"block {block} of volume root" in line for line in mount.complaints())
    assert not any("Traceback" in line for line in mount.complaints())


def test_only_what_is_in_memory_is_answered_in_the_event_loop(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handlers without a mount: whatever reaches the catalog or an object does so in a thread."""
    store = Store.open(str(replica.path))
    handlers = Handlers(store, Tree(store, time.time_ns), Ownership())
    asked: list[int] = []
    replies: list[bytes] = []

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            asked.append(threading.get_ident())
            return function(*args)

        return noted

    monkeypatch.setattr(Catalog, "rows", noting(Catalog.rows))
    monkeypatch.setattr(ObjectPool, "read_verified", noting(ObjectPool.read_verified))
    monkeypatch.setattr(ObjectPool, "fd_of", noting(ObjectPool.fd_of))
    monkeypatch.setattr(pyfuse3, "readdir_reply", lambda token, name, *_: replies.append(name) or True)

    async def use() -> None:
        ctx: Any = None
        for inode in (1, 3, 4):
            await handlers.getattr(inode, ctx)
            await handlers.readdir(await handlers.opendir(inode, ctx), 0, None)
        assert b"latest" in replies and b"before-upgrade" in replies
        await handlers.readlink(2, ctx)
        await handlers.readlink((await handlers.lookup(1, b"seq-13", ctx)).st_ino, ctx)
        instant = (await handlers.lookup(1, replica.name(7).encode(), ctx)).st_ino
        await handlers.getxattr(instant, b"user.pitfs.seq", ctx)  # with the gaps that touch it
        assert len(asked) > 20
        asked.clear()
        # the next are known
        image = (await handlers.lookup(instant, b"root.img", ctx)).st_ino
        await handlers.getattr(image, ctx)
        await handlers.readdir(instant, 0, None)
        file = await handlers.open(image, os.O_RDONLY, ctx)
        assert asked == []
        assert bytes(await handlers.read(file.fh, 0, 4096)) == replica.history.states[7][0][:4096]
        fresh = Handlers(store, Tree(store, time.time_ns), Ownership())
        assert bytes(await fresh.read(image, 0, 4096)) == replica.history.states[7][0][:4096]

    try:
        trio.run(use)
    finally:
        store.close()
    assert asked and threading.get_ident() not in asked


def test_a_listing_in_pieces_is_whole_whoever_reads_beside_it(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(30):
        replica.add(0, bookmark=f"mark-{number}")
    store = Store.open(str(replica.path))
    handlers = Handlers(store, Tree(store, time.time_ns), Ownership())
    begun: list[int] = []
    real = Tree.listing
    monkeypatch.setattr(Tree, "listing", lambda tree, inode, start: begun.append(start) or real(tree, inode, start))

    def reply(token: Any, name: bytes, attributes: object, cookie: int) -> bool:
        if len(token) == 4:
            return False
        token.append((name, cookie))
        return True

    monkeypatch.setattr(pyfuse3, "readdir_reply", reply)

    async def piece(names: list[bytes], start: int) -> int:
        token: Any = []
        await handlers.readdir(3, start, token)
        names += [name for name, _ in token]
        return token[-1][1] if token else -1

    async def use() -> None:
        alone: list[bytes] = []
        cookie = 0
        while cookie >= 0:
            cookie = await piece(alone, cookie)
        assert begun == [0, begun[-1]]  # the last piece had room: that nothing follows is asked anew
        assert len(alone) == len(set(alone)) == 32
        first: list[bytes] = []
        second: list[bytes] = []
        places = [0, 0]
        while max(places) >= 0:
            for index, names in enumerate((first, second)):
                if places[index] >= 0:
                    places[index] = await piece(names, places[index])
        assert first == second == alone
        places[0] = await piece([], 0)
        replica.add(0, bookmark="newest")
        again: list[bytes] = []
        cookie = 0
        while cookie >= 0:
            cookie = await piece(again, cookie)
        assert sorted(again) == sorted([*alone, b"newest"])
        await handlers.releasedir(3)
        assert handlers._listings == {}

    try:
        trio.run(use)
    finally:
        store.close()


def test_the_root_has_a_new_mtime_a_second_after_a_new_point(replica: Replica) -> None:
    store = Store.open(str(replica.path))
    handlers = Handlers(store, Tree(store, time.time_ns), Ownership())
    clock = trio.testing.MockClock()

    async def use() -> None:
        ctx: Any = None
        for seq in (60, 60, 70):
            root = await handlers.getattr(1, ctx)
            assert root.st_mtime_ns == replica.history.times_ns[seq] and root.attr_timeout < 0.1
            if replica.last_seq == 60:
                replica.add(10)
            else:
                clock.jump(1)

    try:
        trio.run(use, clock=clock)
    finally:
        store.close()


def test_mount_finds_the_helper_and_fstab_lines_work(replica: Replica, tmp_path: Path) -> None:
    """In a mount namespace of its own, where /sbin has the helper whether it is installed or not."""
    place, upper, work = (tmp_path / name for name in ("place", "upper", "work"))
    for directory in (place, upper, work):
        directory.mkdir()
    (upper / "mount.pitfs").symlink_to(pitfs_command("mount.pitfs")[0])
    table = tmp_path / "fstab"
    table.write_text(f"{replica.path} {place} pitfs noauto,nofail,_netdev,tz=Europe/Vienna 0 0\n")
    script = f"""set -e
        sbin=$(realpath /sbin)
        mount -t overlay -o lowerdir=$sbin,upperdir={upper},workdir={work} overlay $sbin
        mount -T {table} {place}
        readlink {place}/2025-11-23T00:54:00
        umount {place}
        mount -t pitfs -o strict {replica.path} {place}
        readlink {place}/latest
        umount {place}
        mount -t pitfs -o colour=red {replica.path} {place} || echo $?"""
    done = run(["unshare", "--mount", "sh", "-c", script])
    assert done.stdout.split() == [replica.name(0), replica.name(60), "2"]
    assert "unknown option 'colour=red'" in done.stderr


def test_the_helper_starts_no_heavy_module_before_it_forks() -> None:
    code = (
        "import sys, pitfs.cli.mount; "
        "print([name for name in ('numpy', 'trio', 'pyfuse3', 'apsw') if name in sys.modules])"
    )
    assert run([sys.executable, "-c", code]).stdout.strip() == "[]"
