"""SIGKILL under load: each program, started again, goes on by itself and loses nothing acknowledged.

The writer goes straight to the splitter's file (a filesystem on it would get I/O errors from a dead daemon,
as on a disk that fails). It is the only one and writes stamped writes, so `seq` n is write n for ever: a
write lost or applied twice shows in every later instant.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.checks import (
    check_at_times,
    check_image,
    check_listing,
    last_acknowledged,
    last_fsynced,
    random_times,
)
from tests.helpers.hosts import Mount, Production, Replica, digest, instant_ns, xxhsum
from tests.helpers.load import EXIT_IO_ERROR, WRITE, read_log, running
from tests.helpers.loops import force_unmount
from tests.helpers.processes import wait_until
from tests.helpers.stamps import Plan

pytestmark = [pytest.mark.timeout(120)]
VOLUME_BYTES = 8 << 20
LONGEST_WRITE_S = 3  # a write that waits for a peer would wait for its time-outs, which are longer
LOAD = ("--rate", "400", "--fsync-every", "20", "--direct")


@contextlib.contextmanager
def both_hosts(tmp: Path, interval: str = "500ms") -> Iterator[tuple[Replica, Production]]:
    with (
        Replica(tmp) as replica,
        Production(
            tmp, {"root": VOLUME_BYTES}, port=replica.port, interval=interval, rate="10Gbit"
        ) as production,
    ):
        production.snapshot()
        yield replica, production


def check_all(tmp: Path, replica: Replica, production: Production, log: Path) -> None:
    """Every write of the log is on the replica, once, at its time; both sides are equal."""
    last, plan = production.snapshot(), Plan(1, VOLUME_BYTES)
    assert check_listing(replica.store())["snapshots"][-1]["instant"] == last
    with Mount(replica.store(), tmp, name="check") as mount:
        assert check_image(mount.image(last), plan) == last_acknowledged(log)
        check_at_times(mount, random_times(log, 12, instant_ns(last)), log, plan)
    assert digest(replica.store(), last) == xxhsum(production.volume())


def longest_write_s(log: Path) -> float:
    rows = read_log(log)
    return float((rows["done_ns"] - rows["begun_ns"]).max()) / 1e9


def wait_for_another(production: Production, old_pid: int) -> None:
    wait_until(lambda: production.pids("pitfs-shipper") not in ([], [old_pid]), "a new shipper is there")


def test_a_killed_shipper_is_not_noticed_by_writes_and_its_successor_catches_up(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with both_hosts(tmp_path) as (replica, production):
        with running("stamped", production.volume(), log, *LOAD):
            for _ in range(2):
                time.sleep(1)
                (shipper,) = production.pids("pitfs-shipper")
                before = last_acknowledged(log)
                os.kill(shipper, signal.SIGKILL)
                time.sleep(0.2)
                assert last_acknowledged(log) > before, "writes stand still after the shipper's death"
                wait_for_another(production, shipper)
            killed_ns = time.time_ns()
            production.wait_protected(killed_ns, 20)
        assert longest_write_s(log) < LONGEST_WRITE_S
        check_all(tmp_path, replica, production, log)


def test_killed_protection_started_again_has_every_fsynced_write_and_goes_on(tmp_path: Path) -> None:
    log, plan = tmp_path / "log", Plan(1, VOLUME_BYTES)
    with both_hosts(tmp_path) as (replica, production):
        first = 1
        for _ in range(2):
            with running("stamped", production.volume(), log, *LOAD, "--first", str(first)) as load:
                time.sleep(1.7)
                production.kill()
                assert load.wait(20) == EXIT_IO_ERROR
            production.restart()
            found = plan.find_at(production.volume().read_bytes(), last_acknowledged(log))
            assert found >= last_fsynced(log), "an acknowledged fsync is lost"
            add_to_log(log, found)
            first = found + 1
        with running("stamped", production.volume(), log, *LOAD, "--first", str(first)):
            time.sleep(1)
        check_all(tmp_path, replica, production, log)


def add_to_log(log: Path, found: int) -> None:
    """A write that was under way when all was killed, and that turned out to be in: its answer was lost."""
    rows = read_log(log)
    if found > last_acknowledged(log):
        begun = int(rows["done_ns"][-1])
        row = np.array([(found, WRITE, begun, begun + 60 * 10**9)], rows.dtype)
        with log.open("ab") as file:
            file.write(row.tobytes())


def test_a_killed_receiver_started_again_goes_on_where_it_was(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with both_hosts(tmp_path) as (replica, production):
        with running("stamped", production.volume(), log, *LOAD):
            for pause_s in (1.0, 0.6, 0.9):
                time.sleep(pause_s)
                replica.kill()
                time.sleep(0.3)
                replica.start()
            production.wait_protected(time.time_ns(), 30)
        assert longest_write_s(log) < LONGEST_WRITE_S
        check_all(tmp_path, replica, production, log)


def test_a_killed_mount_harms_nothing_and_mounts_again(tmp_path: Path) -> None:
    log, plan = tmp_path / "log", Plan(1, VOLUME_BYTES)
    with both_hosts(tmp_path) as (replica, production), Mount(replica.store(), tmp_path) as mount:
        with running("stamped", production.volume(), log, *LOAD):
            for _ in range(2):
                time.sleep(1)
                check_image(mount.image("latest"), plan)
                reader = os.open(mount.image("latest"), os.O_RDONLY)
                mount.kill()
                with pytest.raises(OSError, match=r"not connected|connection abort"):
                    os.listdir(mount.path)
                with contextlib.suppress(OSError):  # close(2) tells of the dead daemon too
                    os.close(reader)
                force_unmount(mount.path)  # as its message says: the dead mount is taken away first
                mount.start()
            check_image(mount.image("latest"), plan)
        check_all(tmp_path, replica, production, log)


def test_without_its_minder_protection_ends_in_order_and_starts_again(tmp_path: Path) -> None:
    log, plan = tmp_path / "log", Plan(1, VOLUME_BYTES)
    with both_hosts(tmp_path) as (replica, production):
        with running("stamped", production.volume(), log, *LOAD) as load:
            time.sleep(1)
            assert production.process is not None
            production.process.kill()
            production.process.wait(10)
            wait_until(lambda: not production.pids(), "splitter and shipper end without their minder")
            assert load.wait(20) == EXIT_IO_ERROR
        production.restart()
        plan.check(production.volume().read_bytes(), last_acknowledged(log))
        check_all(tmp_path, replica, production, log)
