"""Writing, shipping, reading and mounting at the same time, for a minute."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from tests.helpers.checks import check_at_times, check_image, check_listing, random_times
from tests.helpers.hosts import Mount, Production, Replica, digest, instant_ns, xxhsum
from tests.helpers.load import running
from tests.helpers.stamps import Plan

pytestmark = [pytest.mark.timeout(180)]
VOLUME_BYTES = 16 << 20
LIVE_S = float(os.environ.get("PITFS_TEST_LIVE_S", "45"))


def test_new_points_appear_while_writes_shipping_reads_and_new_mounts_go_on(tmp_path: Path) -> None:
    plan, log = Plan(1, VOLUME_BYTES), tmp_path / "log"
    random_ = random.Random(1)
    with (
        Replica(tmp_path) as replica,
        Production(
            tmp_path, {"root": VOLUME_BYTES}, port=replica.port, interval="1s", rate="10Gbit"
        ) as production,
    ):
        production.snapshot()
        store = replica.store()
        with Mount(store, tmp_path) as mount:
            seen, latest, reads, turns = [len(mount.instants())], [os.readlink(mount.path / "latest")], 0, 0
            with running(
                "stamped", production.volume(), log, "--rate", "400", "--fsync-every", "50", "--direct"
            ):
                end = time.monotonic() + LIVE_S
                while time.monotonic() < end:
                    turns += 1
                    instants = mount.instants()
                    seen.append(len(instants))
                    latest.append(os.readlink(mount.path / "latest"))
                    check_image(mount.image("latest"), plan)
                    check_image(mount.image(random_.choice(instants)), plan)
                    reads += 2
                    if turns % 5 == 0:
                        with Mount(store, tmp_path, name="another") as another:
                            newest = os.readlink(another.path / "latest")
                            assert check_image(another.image(newest), plan) >= 0
                            assert newest >= latest[-1]
                    assert production.status()["role"] == "production"
            assert seen == sorted(seen)
            assert seen[-1] - seen[0] > LIVE_S / 5, f"only {seen[-1] - seen[0]} new snapshots in {LIVE_S:g} s"
            assert latest == sorted(latest)
            assert len(set(latest)) > min(turns, LIVE_S / 3) / 2, "`latest` stands still"

            quiet = production.snapshot()
            assert digest(store, quiet) == xxhsum(production.volume()) == xxhsum(mount.image(quiet))
            check_at_times(mount, random_times(log, 20, instant_ns(quiet)), log, plan)
            check_listing(store)
            mount.unmount()
            assert mount.complaints() == []
        production.terminate()
        replica.terminate()
    assert production.complaints() == []
    assert replica.complaints() == []
