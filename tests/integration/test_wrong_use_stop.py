"""SIGTERM at bad moments: it ends in bounded time, in order, and what was acknowledged is there afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.helpers.checks import check_image, check_listing, last_acknowledged
from tests.helpers.hosts import Mount, Production, Replica, digest, free_port, xxhsum
from tests.helpers.load import EXIT_IO_ERROR, running
from tests.helpers.loops import LoopDevice, force_unmount, is_mounted
from tests.helpers.processes import pitfs_command, run, wait_until
from tests.helpers.refusals import status_of
from tests.helpers.stamps import Plan

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(120)]
MIB = 1 << 20
VOLUME_BYTES = 16 * MIB


def terminate_within(production: Production, seconds: float, *, though_in_use: bool = False) -> None:
    begun = time.monotonic()
    production.terminate(though_in_use=though_in_use)
    assert time.monotonic() - begun < seconds
    assert not is_mounted(production.mountpoint)
    assert "Traceback" not in production.logged()


def test_a_stop_under_load_loses_no_acknowledged_write_and_needs_no_full_copy(tmp_path: Path) -> None:
    log, plan = tmp_path / "log", Plan(1, VOLUME_BYTES)
    with (
        Replica(tmp_path) as replica,
        Production(tmp_path, {"root": VOLUME_BYTES}, port=replica.port, interval="500ms") as production,
    ):
        production.snapshot()
        with running("stamped", production.volume(), log, "--rate", "800", "--direct") as load:
            time.sleep(1.2)
            terminate_within(production, 10, though_in_use=True)
            assert load.wait(20) == EXIT_IO_ERROR
        production.restart()
        assert plan.find_at(production.volume().read_bytes(), last_acknowledged(log)) in range(
            last_acknowledged(log), last_acknowledged(log) + 2
        )
        last = production.snapshot()
        check_listing(replica.store())
        with Mount(replica.store(), tmp_path) as mount:
            check_image(mount.image(last), plan)
        assert digest(replica.store(), last) == xxhsum(production.volume())
        assert [line for line in production.complaints() if "supervision.minder" not in line] == []


@pytest.mark.slow
def test_a_stop_during_the_first_full_copy_and_snapshots_that_wait_is_in_order(tmp_path: Path) -> None:
    with Replica(tmp_path) as replica:
        production = Production(
            tmp_path, {"root": VOLUME_BYTES}, port=replica.port, interval="60s", rate="8Mbit"
        )  # the copy takes 16 s
        production.backings["root"].write_bytes(os.urandom(VOLUME_BYTES))
        with production:
            production.wait_for_shipper()
            wait_until(
                lambda: status_of(production)["copying"] and "full sync begins" in production.logged(),
                "it copies",
                10,
            )
            waiting = subprocess.Popen(
                [*pitfs_command(), "snapshot", production.config], stderr=subprocess.PIPE, text=True
            )
            time.sleep(1)
            replica.terminate()
            replica.start()
            terminate_within(production, 15)
            _, said = waiting.communicate(timeout=20)
            assert waiting.returncode == 1 and said.count("\n") == 1 and "Traceback" not in said, said
            config = production.config.read_text()
            production.config.write_text(config.replace('rate = "8Mbit"\n', ""))
            production.restart()
            last = production.snapshot()
            assert digest(replica.store(), last) == xxhsum(production.volume())
            assert replica.listing()["gaps"] == []
        assert "Traceback" not in replica.logged() + production.logged()


def test_a_stop_while_writes_wait_for_a_full_journal_does_not_hang(tmp_path: Path) -> None:
    done: list[int] = []

    def write() -> None:
        fd = os.open(production.volume(), os.O_RDWR)
        try:
            for number in range(256):
                os.pwrite(fd, bytes([number]) * (1 << 17), (number % 64) << 17)
                done.append(number)
        except OSError:
            return
        finally:
            with contextlib.suppress(OSError):
                os.close(fd)

    with Production(
        tmp_path, {"root": 8 * MIB}, port=free_port(), interval="60s", capacity="16MiB", on_full="block"
    ) as production:
        writer = threading.Thread(target=write)
        writer.start()
        wait_until(lambda: "writes wait for it" in production.logged(), "a write waits", 20)
        terminate_within(production, 15, though_in_use=True)
        writer.join(10)
        assert not writer.is_alive()
        content = production.backings["root"].read_bytes()
        for number in done[-32:]:  # the write that waited may be the one 64 behind, nothing of these
            found = content[(number % 64) << 17 : ((number % 64) + 1) << 17]
            assert set(found) == {number}
        with Replica(tmp_path, production.port) as replica:
            production.restart()
            last = production.snapshot()
            assert digest(replica.store(), last) == xxhsum(production.volume())
            assert replica.listing()["gaps"] == []


@pytest.mark.loop
def test_a_stop_waits_for_who_uses_a_volume_and_serves_and_replicates_meanwhile(tmp_path: Path) -> None:
    with (
        Replica(tmp_path) as replica,
        Production(tmp_path, {"root": VOLUME_BYTES, "data": MIB}, port=replica.port, interval="1s") as production,
        LoopDevice(production.volume()) as device,
    ):
        process, live = production.process, tmp_path / "live"
        assert process is not None
        run(["mkfs.ext4", "-q", device])
        live.mkdir()
        run(["mount", device, live])
        opened = os.open(production.volume("data"), os.O_RDWR)
        try:
            process.send_signal(signal.SIGTERM)
            by_whom = f"{production.volume()}: {device}, mounted on {live}: umount {live}, then losetup -d {device}"
            wait_until(lambda: by_whom in production.logged(), "it says who uses the one", 20)
            by_whom = f"{production.volume('data')}: opened by process {os.getpid()} "
            wait_until(lambda: by_whom in production.logged(), "it says who uses the other", 20)
            (live / "file").write_text("written while it waits")
            os.sync()
            os.pwrite(opened, b"this too", 0)
            os.fsync(opened)
            last = production.snapshot()
            with Mount(replica.store(), tmp_path) as mount:
                assert mount.image(last, "data").read_bytes()[:8] == b"this too"
            os.close(opened)
            opened = -1
            wait_until(lambda: production.logged().count(f"{device}, mounted on") == 2, "it says what changed", 20)
            assert process.poll() is None and is_mounted(production.mountpoint)
        finally:
            if opened >= 0:
                os.close(opened)
            force_unmount(live)
        run(["losetup", "-d", device])
        assert process.wait(30) == 0
        assert "no volume is in use any more: stopping" in production.logged()
        assert "still attached" not in production.logged() and not is_mounted(production.mountpoint)
        production.restart()
        assert digest(replica.store(), production.snapshot()) == xxhsum(production.volume())
        assert replica.listing()["gaps"] == []


@pytest.mark.loop
def test_a_stop_with_a_loop_device_attached_says_so_and_does_not_hang(tmp_path: Path) -> None:
    with (
        Replica(tmp_path) as replica,
        Production(tmp_path, {"root": VOLUME_BYTES}, port=replica.port, interval="60s") as production,
        LoopDevice(production.volume()) as device,
    ):
        run(["mkfs.ext4", "-q", device])
        live = tmp_path / "live"
        live.mkdir()
        run(["mount", device, live])
        try:
            (live / "synced").write_text("this was synced")
            os.sync()
            terminate_within(production, 20, though_in_use=True)
            (line,) = [line for line in production.logged().splitlines() if "is still attached" in line]
            assert (
                f"{production.volume()}: {device} is still attached" in line
                and f"losetup -d {device}" in line
            )
            with pytest.raises(OSError), (live / "later").open("w") as file:
                file.write("x")
                file.flush()
                os.fsync(file.fileno())
        finally:
            force_unmount(live)
        run(["losetup", "-d", device])
        wait_until(
            lambda: not run(["losetup", "-j", production.volume()]).stdout, "the device is detached", 10
        )
        production.restart()
        last = production.snapshot()
        assert digest(replica.store(), last) == xxhsum(production.volume())
        with Mount(replica.store(), tmp_path) as mount:
            run(["cp", mount.image(last), tmp_path / "copy"])
        with LoopDevice(tmp_path / "copy") as copied:
            run(["e2fsck", "-p", copied], accept=(0, 1))
            live = tmp_path / "copied"
            live.mkdir()
            run(["mount", copied, live])
            try:
                assert (live / "synced").read_text() == "this was synced"
            finally:
                force_unmount(live)


def test_a_second_signal_and_one_before_ready_end_it_too(tmp_path: Path) -> None:
    production = Production(tmp_path, {"root": MIB}, port=free_port())
    process = subprocess.Popen(production.command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(0.25)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=20)
    assert "Traceback" not in said and process.returncode in (0, -signal.SIGTERM), (process.returncode, said)
    assert not is_mounted(production.mountpoint)
    with production:
        assert production.process is not None
        production.process.send_signal(signal.SIGINT)
        production.process.send_signal(signal.SIGTERM)
        assert production.process.wait(20) == 0
    assert "Traceback" not in production.logged()


@pytest.mark.slow
def test_a_receiver_stopped_within_a_transfer_goes_on_with_it(tmp_path: Path) -> None:
    with Replica(tmp_path) as replica:
        production = Production(
            tmp_path, {"root": VOLUME_BYTES}, port=replica.port, interval="60s", rate="24Mbit"
        )
        production.backings["root"].write_bytes(os.urandom(VOLUME_BYTES))
        with production:
            wait_until(lambda: "full sync begins" in production.logged(), "it copies", 10)
            time.sleep(1.5)
            replica.terminate()
            replica.start()
            assert digest(replica.store(), production.snapshot()) == xxhsum(production.volume())
        assert "Traceback" not in replica.logged() + production.logged()
