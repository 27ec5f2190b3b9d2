"""PostgreSQL on ext4 on the splitter's volume: at any instant it recovers, and has what was acknowledged by then."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import postgresql
from tests.helpers.hosts import Mount, Production, Replica, instant_name
from tests.helpers.load import POSTGRESQL_PAYLOAD, read_log, running
from tests.helpers.loops import LoopDevice, MountedFilesystem
from tests.helpers.processes import run

pytestmark = [pytest.mark.loop, pytest.mark.fuse]
VOLUME_BYTES = 256 << 20
INSTANTS = 3
RUN_S = 6.0
LONG_RUN_S = float(os.environ.get("PITFS_TEST_POSTGRESQL_S", "60"))
# Small segments and little room for them: checkpoints every few seconds, segments used again.
INITDB = ["--data-checksums", "--wal-segsize=1"]
SETTINGS = {"fsync": "on", "synchronous_commit": "on", "shared_buffers": "16MB", "max_wal_size": "3MB",
            "min_wal_size": "2MB"}  # fmt: skip


@pytest.fixture(autouse=True)
def installed() -> None:
    if reason := postgresql.missing():
        pytest.skip(reason)


@pytest.fixture
def place() -> Iterator[Path]:
    with postgresql.open_directory() as directory:
        yield directory


def test_recovers_at_random_instants_while_replication_goes_on(tmp_path: Path, place: Path) -> None:
    check(tmp_path, place, RUN_S, INSTANTS)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_recovers_at_random_instants_of_a_longer_run(tmp_path: Path, place: Path) -> None:
    check(tmp_path, place, LONG_RUN_S, 10)


def check(tmp: Path, place: Path, run_s: float, instants: int) -> None:
    log = tmp / "acknowledged"
    (tmp / "scratch").mkdir()
    with (
        Replica(tmp) as replica,
        Production(
            tmp, {"root": VOLUME_BYTES}, port=replica.port, interval="2s", rate="10Gbit"
        ) as production,
    ):
        with (
            ext4_on_loop(production.volume()) as device,
            MountedFilesystem(device, place / "live", "ext4") as live,
            postgresql.Cluster(live / "cluster", tmp / "live.log", SETTINGS, INITDB) as cluster,
            load(cluster, log),
        ):
            from_ns = int(read_log(log)["begun_ns"][0])
            time.sleep(run_s)
            to_ns = time.time_ns()
            production.wait_protected(to_ns)
            random_ = random.Random(1)
            with Mount(replica.store(), tmp, options=f"scratch={tmp / 'scratch'}") as mount:
                for time_ns in sorted(random_.randrange(from_ns, to_ns) for _ in range(instants)):
                    check_instant(mount, time_ns, log, place)
                mount.unmount()
            assert mount.complaints() == []
        production.terminate()
        replica.terminate()
    assert production.complaints() == []
    assert replica.complaints() == []


@contextlib.contextmanager
def ext4_on_loop(volume: Path) -> Iterator[Path]:
    with LoopDevice(volume) as device:
        run(["mkfs.ext4", "-q", "-F", device])
        yield device


@contextlib.contextmanager
def load(cluster: postgresql.Cluster, log: Path) -> Iterator[None]:
    """pgbench, and beside it rows committed one by one; entered when both are at work."""
    cluster.run("pgbench", "--initialize", "--scale=1", "--quiet")
    bench = cluster.start("pgbench", "--client=2", "--time=100000", "--rate=150")
    try:
        with running("postgresql", log, environment=cluster.environment()):
            while not len(read_log(log)):
                time.sleep(0.05)
            yield
        assert bench.poll() is None, cluster.tail()
    finally:
        bench.terminate()
        bench.wait(30)


def check_instant(mount: Mount, time_ns: int, log: Path, place: Path) -> None:
    """A server on the writable image of then, its filesystem's journal replayed."""
    instant = instant_name(time_ns)
    with (
        LoopDevice(mount.image(instant)) as device,
        MountedFilesystem(device, place / "then", "ext4") as then,
    ):
        # It names the live server, which runs on this machine too: PostgreSQL would take itself for running.
        (then / "cluster" / "postmaster.pid").unlink()
        with postgresql.Cluster(then / "cluster", place / "then.log", SETTINGS) as cluster:
            check_numbers(cluster, time_ns, log)
            check_balances(cluster)
            cluster.run("pg_amcheck", "--install-missing", "--heapallindexed")
            cluster.run("pg_dumpall", "--no-sync", "--file=/dev/null")


def check_numbers(cluster: postgresql.Cluster, time_ns: int, log: Path) -> None:
    """All rows that were acknowledged by then are there, none that was begun later, none is missing between."""
    payload = POSTGRESQL_PAYLOAD.format(n="n")
    ((count, last, right),) = cluster.query(
        f"SELECT count(*), coalesce(max(n), 0), coalesce(bool_and(payload = {payload}), true) FROM numbered"
    )
    rows = read_log(log)
    acknowledged = int(rows["n"][rows["done_ns"] <= time_ns].max(initial=0))
    begun = int(rows["n"][rows["begun_ns"] <= time_ns].max(initial=0))
    assert right == "t" and count == last
    assert acknowledged <= int(last) <= begun, (instant_name(time_ns), acknowledged, last, begun)


def check_balances(cluster: postgresql.Cluster) -> None:
    """pgbench changes all four by the same in one transaction."""
    tables = (
        ("abalance", "accounts"),
        ("tbalance", "tellers"),
        ("bbalance", "branches"),
        ("delta", "history"),
    )
    sums = [f"(SELECT coalesce(sum({column}), 0) FROM pgbench_{table})" for column, table in tables]
    (found,) = cluster.query(f"SELECT {', '.join(sums)}")
    assert len(set(found)) == 1, found
