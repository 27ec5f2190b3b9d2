"""Full disks and full journals on either side, on small filesystems of their own.

Production writes go on (or wait, with on_full = "block"), reading the replica goes on, status says why, all
mends itself when there is room, and every listed instant is exact.
"""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from pitfs.errors import CapacityError
from pitfs.model.transfer import VolumeInfo
from pitfs.store.ingest import Ingest
from pitfs.store.store import Store
from tests.helpers.hosts import Mount, Production, Replica, digest, free_port, instant_ns, xxhsum
from tests.helpers.loops import LoopDevice, MountedFilesystem, fill, free_file
from tests.helpers.processes import pitfs_command, run, wait_until
from tests.helpers.refusals import pitfs_refused, refused, status_of, together, write_config
from tests.helpers.stores import ingest_transfer
from tests.helpers.transfers import History

pytestmark = [pytest.mark.fuse, pytest.mark.loop, pytest.mark.timeout(120)]
MIB = 1 << 20
VOLUME_BYTES = 24 * MIB
CHUNK_BYTES = 1 << 17


@contextmanager
def small_disk(tmp: Path, name: str = "disk", size_bytes: int = 64 * MIB) -> Iterator[Path]:
    """An ext4 of its own."""
    with LoopDevice(free_file(tmp / f"{name}.img", size_bytes)) as device:
        run(["mkfs.ext4", "-q", "-m", "0", device])
        with MountedFilesystem(device, tmp / name, "ext4") as mounted:
            yield mounted


class Writer:
    """Writes chunk after chunk to the volume, in a thread of its own, and remembers what is in it."""

    def __init__(self, production: Production) -> None:
        self.volume = production.volume()
        self.content = bytearray(VOLUME_BYTES)
        self.done_bytes = 0
        self.error: OSError | None = None
        self._random = random.Random(3)
        self._thread: threading.Thread | None = None

    def write(self, total_bytes: int) -> None:
        """All of it, now."""
        fd = os.open(self.volume, os.O_RDWR)
        try:
            for _ in range(total_bytes // CHUNK_BYTES):
                offset = self._random.randrange(VOLUME_BYTES // CHUNK_BYTES) * CHUNK_BYTES
                data = self._random.randbytes(CHUNK_BYTES)
                assert os.pwrite(fd, data, offset) == CHUNK_BYTES
                self.content[offset : offset + CHUNK_BYTES] = data
                self.done_bytes += CHUNK_BYTES
            os.fsync(fd)
        finally:
            os.close(fd)

    def begin(self, total_bytes: int) -> None:
        """All of it, in the background: it may have to wait."""

        def write() -> None:
            try:
                self.write(total_bytes)
            except OSError as error:
                self.error = error

        self._thread = threading.Thread(target=write, daemon=True)
        self._thread.start()

    def goes_on(self) -> bool:
        before = self.done_bytes
        time.sleep(0.7)
        return self.done_bytes > before or not (self._thread and self._thread.is_alive())

    def end(self, timeout_s: float = 30) -> bytes:
        assert self._thread is not None
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "the write still waits"
        assert self.error is None
        return bytes(self.content)


def check_images(replica: Replica, tmp: Path, states: dict[str, bytes], warning: str | None = None) -> None:
    """`warning`: words of the one line that may be logged."""
    # Logs of one name are one.
    with Mount(replica.store(), tmp, name="check" if warning is None else "warned") as mount:
        for instant, content in states.items():
            assert mount.image(instant).read_bytes() == content, instant
        assert [line for line in mount.complaints() if warning is None or warning not in line] == []


def lines_with(production: Production, words: str) -> list[str]:
    return [line for line in production.logged().splitlines() if words in line]


def test_a_full_replica_stops_acknowledging_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    states = {}
    with (
        small_disk(tmp_path) as disk,
        Replica(tmp_path, root=disk / "stores") as replica,
        Production(tmp_path, {"root": VOLUME_BYTES}, port=replica.port, interval="60s") as production,
    ):
        writer = Writer(production)
        writer.write(4 * MIB)
        states[production.snapshot()] = bytes(writer.content)
        with Mount(replica.store(), tmp_path) as mount:
            fill(disk / "ballast")
            writer.write(8 * MIB)
            (instant,) = states

            def snapshot_gives_up() -> None:
                begun = time.monotonic()
                refused([*pitfs_command(), "snapshot", production.config], 1, "not on the replica yet",
                        "No space left on device", "make room")  # fmt: skip
                assert 5 < time.monotonic() - begun < 15

            def reading_goes_on() -> None:
                """By the mount that is there, by a new one, and by the commands."""
                wait_until(
                    lambda: "No space left on device" in status_of(production)["link"], "it is full", 10
                )
                check_images(replica, tmp_path, states, "not pinned: No space left on device")
                assert mount.image(instant).read_bytes() == states[instant]
                newest = os.readlink(mount.path / "latest")  # writes streamed for as long as there was room
                assert newest >= instant and digest(replica.store(), newest) == xxhsum(mount.image(newest))
                assert replica.listing()["snapshots"][-1]["instant"] == instant

            together(snapshot_gives_up, reading_goes_on)
            assert "No space left on device" in status_of(production)["link"]
            assert status_of(production)["passing"] is None
            writer.write(MIB)
            (disk / "ballast").unlink()
            last = production.snapshot(30)
            states[last] = bytes(writer.content)
            assert mount.image("latest").read_bytes() == states[last]
        listing = replica.listing()
        assert listing["gaps"] == [] and all(each["granularity_ns"] == 0 for each in listing["intervals"])
        check_images(replica, tmp_path, states)
        causes = [line.partition(" INFO ")[2] for line in lines_with(production, "No space left on device")]
        assert causes and len(set(causes)) == len(causes), f"each is said once: {production.logged()}"
        assert status_of(production)["link"] == "connected"
        assert "Traceback" not in replica.logged() + production.logged()
        assert len(replica.complaints()) < 12, replica.logged()


def test_a_replica_too_full_to_begin_begins_when_there_is_room(tmp_path: Path) -> None:
    with small_disk(tmp_path, size_bytes=8 * MIB) as disk:
        (disk / "stores").mkdir()
        fill(disk / "ballast")
        with (
            Replica(tmp_path, root=disk / "stores") as replica,
            Production(tmp_path, {"root": VOLUME_BYTES}, port=replica.port, interval="60s") as production,
        ):
            writer = Writer(production)
            writer.write(MIB)
            production.wait_for_shipper()
            wait_until(lambda: "make room" in status_of(production)["link"], "status says why", 10)
            (disk / "ballast").unlink()
            assert digest(replica.store(), production.snapshot()) == xxhsum(production.volume())
            assert "Traceback" not in replica.logged() + production.logged()


@contextmanager
def full_state_disk(tmp: Path) -> Iterator[tuple[Path, str, Callable[[], None], Callable[[], None]]]:
    """A state directory on a disk that can be filled: (directory, capacity, fill it, make room)."""
    with small_disk(tmp) as disk:
        (disk / "state").mkdir()
        yield disk / "state", "48MiB", lambda: fill(disk / "ballast"), (disk / "ballast").unlink


@contextmanager
def small_journal(tmp: Path) -> Iterator[tuple[Path, str, Callable[[], None], Callable[[], None]]]:
    """A state directory with a journal that is soon used up; room comes with the receiver."""
    yield tmp / "state", "16MiB", lambda: None, lambda: None


Full = Callable[[Path], AbstractContextManager[tuple[Path, str, Callable[[], None], Callable[[], None]]]]


@pytest.mark.parametrize("full", [full_state_disk, pytest.param(small_journal, marks=pytest.mark.slow)])
def test_a_full_journal_with_degrade_passes_writes_and_shows_the_gap(tmp_path: Path, full: Full) -> None:
    states: dict[str, bytes] = {}
    cause = "No space left on device" if full is full_state_disk else "capacity of 16777216 bytes is used up"
    with (
        full(tmp_path) as (state, capacity, use_up, make_room), Replica(tmp_path) as replica,
        Production(tmp_path, {"root": VOLUME_BYTES}, port=replica.port, interval="60s", state=state,
                   capacity=capacity, on_full="degrade") as production,
    ):  # fmt: skip
        writer = Writer(production)
        writer.write(2 * MIB)
        states[production.snapshot()] = bytes(writer.content)
        replica.terminate()
        use_up()
        begun = time.monotonic()
        writer.write(20 * MIB)
        assert time.monotonic() - begun < 15
        assert production.volume().read_bytes() == writer.content
        status = status_of(production)
        assert status["passing"] and cause in status["passing"], production.logged()
        assert f"{state}" in status["passing"] and status["changed_bytes"] > 0
        refused([*pitfs_command(), "snapshot", production.config], 1, cause, "no snapshot can be taken")
        refused([*pitfs_command(), "bookmark", production.config, "x"], 1, cause)
        time.sleep(2)  # many tries to begin again: nothing of it may be said again and again
        assert len(lines_with(production, "writes go on, but no instant")) == 1, production.logged()
        assert lines_with(production, "journalling again") == []
        make_room()
        writer.write(MIB)
        replica.start()
        wait_until(lambda: status_of(production)["passing"] is None, "it journals again", 20, 0.2)
        writer.write(MIB)
        last = snapshot_outside_of_the_gap(production)
        states[last] = bytes(writer.content)
        writer.write(MIB)
        states[production.snapshot()] = bytes(writer.content)
        assert digest(replica.store(), "latest") == xxhsum(production.volume())
        (gap,) = replica.listing()["gaps"]
        assert cause in gap["cause"]
        assert instant_ns(min(states)) < instant_ns(gap["from"]) < instant_ns(gap["to"]) <= instant_ns(last)
        check_images(replica, tmp_path, states)
        assert "Traceback" not in production.logged() + replica.logged()
        assert len(lines_with(production, "writes go on, but no instant")) == 1
        assert len(lines_with(production, "full sync begins")) == 1, "the first one"
        assert len(lines_with(production, "full sync of what changed committed")) == 1
        status = status_of(production)
        assert (status["changed_bytes"], status["copying"], status["copying_bytes"]) == (None, False, None)


def test_a_stop_while_writes_pass_keeps_what_changed(tmp_path: Path) -> None:
    states: dict[str, bytes] = {}
    with (
        Replica(tmp_path) as replica,
        Production(tmp_path, {"root": VOLUME_BYTES}, port=replica.port, interval="60s", capacity="16MiB",
                   on_full="degrade") as production,
    ):  # fmt: skip
        writer = Writer(production)
        writer.write(2 * MIB)
        states[production.snapshot()] = bytes(writer.content)
        replica.terminate()
        writer.write(20 * MIB)
        changed = status_of(production)["changed_bytes"]
        production.terminate()
        production.restart()
        production.wait_for_shipper()
        writer.write(MIB)
        assert status_of(production)["passing"] and status_of(production)["changed_bytes"] >= changed > 0
        replica.start()
        wait_until(lambda: status_of(production)["passing"] is None, "it journals again", 20, 0.2)
        states[snapshot_outside_of_the_gap(production)] = bytes(writer.content)
        assert len(replica.listing()["gaps"]) == 1
        check_images(replica, tmp_path, states)
        assert len(lines_with(production, "full sync begins")) == 1, "the first one"


def snapshot_outside_of_the_gap(production: Production) -> str:
    """One that was set before production noticed lies in the gap, and says so."""
    done = run([*pitfs_command(), "snapshot", production.config], accept=(0, 1))
    return done.stdout.strip() if done.returncode == 0 else production.snapshot()


@pytest.mark.parametrize("full", [pytest.param(full_state_disk, marks=pytest.mark.slow), small_journal])
def test_a_full_journal_with_block_makes_writes_wait_and_loses_nothing(tmp_path: Path, full: Full) -> None:
    states: dict[str, bytes] = {}
    with (
        full(tmp_path) as (state, capacity, use_up, make_room), Replica(tmp_path) as replica,
        Production(tmp_path, {"root": VOLUME_BYTES}, port=replica.port, interval="60s", state=state,
                   capacity=capacity, on_full="block") as production,
    ):  # fmt: skip
        writer = Writer(production)
        writer.write(2 * MIB)
        states[production.snapshot()] = bytes(writer.content)
        replica.terminate()
        use_up()
        writer.begin(30 * MIB)
        wait_until(lambda: not writer.goes_on(), "writes wait", 20)
        assert production.volume().stat().st_size == VOLUME_BYTES, "others aren't held up"
        status = status_of(production)
        assert status["passing"] is None and status["link"] and status["writes_waiting"] >= 1
        assert len(lines_with(production, "writes wait for it")) == 1, production.logged()
        make_room()
        replica.start()
        writer.end()
        states[production.snapshot()] = bytes(writer.content)
        listing = replica.listing()
        assert listing["gaps"] == [] and all(each["granularity_ns"] == 0 for each in listing["intervals"])
        check_images(replica, tmp_path, states)
        assert "Traceback" not in production.logged() + replica.logged()


def test_a_start_with_a_full_state_disk_says_so_and_a_passing_one_starts_again(tmp_path: Path) -> None:
    with small_disk(tmp_path) as disk:
        fill(disk / "ballast")
        backing = free_file(tmp_path / "backing", MIB)
        config = write_config(tmp_path, {"root": backing}, state=disk / "new")
        ways_out = "make room on that file system, then try again"
        pitfs_refused(1, f"{disk}/new", f"No space left on device: {ways_out}", args=["protect", config])
        (disk / "ballast").unlink()
        with Production(tmp_path, {"root": VOLUME_BYTES}, port=free_port(), interval="60s", state=disk / "state",
                        capacity="48MiB") as production:  # fmt: skip
            writer = Writer(production)
            fill(disk / "ballast")
            writer.write(16 * MIB)
            assert "No space" in status_of(production)["passing"]
            production.terminate()
            production.restart()
            assert production.volume().read_bytes() == writer.content
            writer.write(8 * MIB)
            assert production.volume().read_bytes() == writer.content
            production.wait_for_shipper()
            assert "No space" in status_of(production)["passing"]
            assert "Traceback" not in production.logged()


def test_a_full_disk_below_the_backing_fails_that_write_and_is_no_end(tmp_path: Path) -> None:
    with small_disk(tmp_path, size_bytes=16 * MIB) as disk:
        backing = free_file(disk / "backing", VOLUME_BYTES)
        with (
            Replica(tmp_path) as replica,
            Production(tmp_path, {"root": backing}, port=replica.port, interval="60s") as production,
        ):
            writer = Writer(production)
            writer.write(MIB)
            before = production.snapshot()
            content = bytes(writer.content)
            fill(disk / "ballast")
            with pytest.raises(OSError, match="No space left") as caught:
                writer.write(20 * MIB)
            assert caught.value.errno == errno.ENOSPC
            (disk / "ballast").unlink()
            wait_until(lambda: status_of(production)["passing"] is None, "it journals again", 20, 0.2)
            Writer(production).write(MIB)
            last = snapshot_outside_of_the_gap(production)
            assert digest(replica.store(), last) == xxhsum(production.volume())
            check_images(replica, tmp_path, {before: content})
            assert len(lines_with(production, "writes go on, but no instant")) == 1
            assert "Traceback" not in production.logged()


def test_a_replica_too_full_to_be_opened_says_how_much_room_that_takes(tmp_path: Path) -> None:
    history = History(1, (VolumeInfo("root", 8192, 4096),))
    small = tmp_path / "small"
    small.mkdir()
    run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small])
    try:
        ingest = Ingest(str(small), history.hello)
        ingest_transfer(ingest, history.close_interval(0))
        ingest.close()
        fill(small / "ballast")
        with pytest.raises(CapacityError, match=r"make room on that file system \(32 KiB\)"):
            Store.open(str(small / history.group))
        (small / "ballast").unlink()
        Store.open(str(small / history.group)).close()
    finally:
        run(["umount", small])
