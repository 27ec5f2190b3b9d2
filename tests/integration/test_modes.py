"""Modes sync, async and dynamic between real processes: what the replica has, and when a write returns."""

from __future__ import annotations

import mmap
import os
import shutil
import threading
from pathlib import Path

import pytest

from tests.helpers.checks import check_at_times, check_image, last_acknowledged, random_times
from tests.helpers.hosts import Mount, Production, Replica, ask, instant_ns
from tests.helpers.load import running
from tests.helpers.loops import free_file
from tests.helpers.processes import wait_until
from tests.helpers.stamps import MAX_SECTORS, SECTOR_BYTES, Plan

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(120)]
VOLUME_BYTES = 4 << 20
IN_STEP = "in step"


def in_step(production: Production) -> None:
    wait_until(lambda: production.status()["sync"] == IN_STEP, "the replica is in step", 30, 0.1)


def wait_readable(replica: Replica, seq: int) -> None:
    """Until the newest instant that can be read is exactly that write's."""

    def newest() -> int:
        return int(ask("resolve", replica.store(), "latest", "--json")["seq"])

    wait_until(lambda: newest() >= seq, f"write {seq} is readable", 30, 0.1)
    assert newest() == seq


def seq_of(mount: Mount) -> int:
    return int(os.getxattr(mount.image("latest"), "user.pitfs.seq"))


class Writer:
    """Writes of a plan, one after the other, that know which of them returned."""

    def __init__(self, volume: Path, plan: Plan) -> None:
        self.plan, self.done = plan, 0
        self._fd = os.open(volume, os.O_RDWR | os.O_DIRECT)  # else the kernel makes several of one
        self._buffer = mmap.mmap(-1, MAX_SECTORS * SECTOR_BYTES)  # aligned, as O_DIRECT wants

    def write(self, count: int = 1) -> None:
        for n in range(self.done + 1, self.done + count + 1):
            content = self.plan.content(n)
            self._buffer[: len(content)] = content
            os.pwritev(self._fd, [memoryview(self._buffer)[: len(content)]], self.plan.sectors(n)[0] * SECTOR_BYTES)
            self.done = n

    def close(self) -> None:
        os.close(self._fd)


def test_sync_what_was_acknowledged_survives_the_loss_of_the_production_host(tmp_path: Path) -> None:
    plan, log = Plan(1, VOLUME_BYTES), tmp_path / "log"
    with Replica(tmp_path) as replica:
        with Production(
            tmp_path, {"root": VOLUME_BYTES}, port=replica.port, interval="1h", mode="sync"
        ) as production:
            production.snapshot()
            in_step(production)
            with running("stamped", production.volume(), log, "--count", "1000", "--direct") as load:
                load.wait(90)
            assert last_acknowledged(log) == 1000
            production.kill()
            shutil.rmtree(production.state)
            production.backings["root"].unlink()
        wait_readable(replica, 1000)
        with Mount(replica.store(), tmp_path) as mount:
            assert check_image(mount.image("latest"), plan) == 1000
            check_at_times(mount, random_times(log, 20, instant_ns(os.readlink(mount.path / "latest"))), log, plan)
        assert [line for line in replica.complaints() if "session ended" not in line] == []


@pytest.mark.parametrize("mode", ["async", "dynamic"])
def test_what_was_written_is_readable_before_the_interval_ends(tmp_path: Path, mode: str) -> None:
    plan, log = Plan(2, VOLUME_BYTES), tmp_path / "log"
    with (
        Replica(tmp_path) as replica,
        Production(tmp_path, {"root": VOLUME_BYTES}, port=replica.port, interval="1h", mode=mode) as production,
    ):
        production.snapshot()
        with Mount(replica.store(), tmp_path) as mount:
            options = ("--seed", "2", "--count", "400", "--rate", "200", "--direct")
            with running("stamped", production.volume(), log, *options) as load:
                wait_until(lambda: load.poll() is not None or seq_of(mount) >= 50, "some are readable", 30, 0.1)
                early = mount.image("latest").open("rb")
                seq = int(os.getxattr(early.fileno(), "user.pitfs.seq"))
                plan.check(early.read(), seq)
                load.wait(60)
            wait_readable(replica, 400)
            assert len(mount.instants()) == 1, "no interval has ended"
            assert check_image(mount.image("latest"), plan) == 400
            assert os.getxattr(mount.image("latest"), "user.pitfs.granularity") == b"0"
            until_ns = instant_ns(os.readlink(mount.path / "latest"))
            check_at_times(mount, random_times(log, 20, until_ns), log, plan)
            assert production.status()["shipping"] == "streaming"
            production.snapshot()
            assert len(mount.instants()) == 2
            check_at_times(mount, random_times(log, 20, until_ns), log, plan)
            early.seek(0)
            plan.check(early.read(), seq)  # an image that was open all the time stays right
            early.close()
            assert [each["granularity_ns"] for each in replica.listing()["intervals"]] == [0]
            assert mount.complaints() == []
        assert production.complaints() == [] and replica.complaints() == []


def test_degrade_goes_on_without_the_replica_and_says_so(tmp_path: Path) -> None:
    plan = Plan(3, VOLUME_BYTES)
    with (
        Replica(tmp_path) as replica,
        Production(tmp_path, {"root": VOLUME_BYTES}, port=replica.port, interval="1h", mode="sync") as production,
    ):
        production.snapshot()
        in_step(production)
        writer = Writer(production.volume(), plan)
        writer.write(5)
        wait_readable(replica, 5)
        replica.terminate()
        writer.write(5)  # returns
        assert "degraded" in production.status()["sync"]
        replica.start()
        in_step(production)
        wait_readable(replica, 10)
        writer.write(5)
        writer.close()
        wait_readable(replica, 15)
        with Mount(replica.store(), tmp_path) as mount:
            assert check_image(mount.image("latest"), plan) == 15


def test_block_waits_for_the_replica(tmp_path: Path) -> None:
    plan = Plan(4, VOLUME_BYTES)
    with (
        Replica(tmp_path) as replica,
        Production(
            tmp_path, {"root": VOLUME_BYTES}, port=replica.port, interval="1h", mode="sync", on_disconnect="block"
        ) as production,
    ):
        production.snapshot()
        in_step(production)
        writer = Writer(production.volume(), plan)
        writer.write(5)
        replica.terminate()
        thread = threading.Thread(target=writer.write, args=(5,))
        thread.start()
        wait_until(lambda: (production.status()["writes_waiting"] or 0) == 1, "a write waits", 30, 0.1)
        assert writer.done == 5 and "writes wait" in production.status()["sync"]
        replica.start()
        thread.join(60)
        assert writer.done == 10
        writer.close()
        wait_readable(replica, 10)


def test_a_change_of_mode_loses_nothing_and_is_visible(tmp_path: Path) -> None:
    plan = Plan(5, VOLUME_BYTES)
    backing = free_file(tmp_path / "backing", VOLUME_BYTES)
    with Replica(tmp_path) as replica:
        done = 0
        for mode in ("snapshot", "async", "sync", "snapshot", "dynamic", "sync"):
            with Production(
                tmp_path, {"root": backing}, port=replica.port, interval="1h", mode=mode
            ) as production:
                production.snapshot()
                writer = Writer(production.volume(), plan)
                writer.done = done
                writer.write(30)
                done = writer.done
                writer.close()
                shipping = production.status()["shipping"]
                assert production.status()["mode"] == mode
                assert shipping == ("mode is snapshot" if mode == "snapshot" else "streaming")
                if mode == "async":
                    wait_readable(replica, done)
                else:
                    production.snapshot()
                production.terminate()
        listing = replica.listing()
        assert listing["gaps"] == []
        with Mount(replica.store(), tmp_path) as mount:
            assert check_image(mount.image("latest"), plan) == done
            for name in mount.instants():
                check_image(mount.image(name), plan)
