"""Over a real link between network namespaces, with TLS: the kernel counts what crosses, headers and all."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
import trustme

from tests.helpers.hosts import Production, Replica, digest, xxhsum
from tests.helpers.links import issue
from tests.helpers.netlink import REPLICA_ADDRESS, Wire, wire_bytes

pytestmark = [pytest.mark.fuse, pytest.mark.wire, pytest.mark.timeout(120)]
RATE_BYTES_PER_S = 1_000_000
MIB = 1 << 20
WINDOW_S = 3.0
LOOK_S = 4.5


def test_no_more_crosses_than_the_rate_and_a_cable_may_be_pulled(tmp_path: Path) -> None:
    authority = trustme.CA()
    theirs = issue(tmp_path, "replica", authority, REPLICA_ADDRESS)
    ours = issue(tmp_path, "production", authority, "production.example")
    keys = ("certificate", "key", "authority")
    options = [word for key in keys for word in (f"--{key}", getattr(theirs, key))]
    with (
        Wire(4 * RATE_BYTES_PER_S) as wire,
        Replica(tmp_path, 7420, host=REPLICA_ADDRESS, within=wire.within_replica, tls=options) as replica,
        Production(
            tmp_path, {"root": 8 * MIB}, port=7420, host=REPLICA_ADDRESS, within=wire.within_production,
            tls=[f'{key} = "{getattr(ours, key)}"' for key in keys], interval="1h", rate="8Mbit",
        ) as production,
    ):  # fmt: skip
        production.snapshot()
        assert production.process is not None
        production.volume().write_bytes(os.urandom(6 * MIB) + bytes(2 * MIB))
        seen = []
        begun = time.monotonic()
        while time.monotonic() < begun + LOOK_S:
            seen.append((time.monotonic(), wire_bytes(production.process.pid)))
            time.sleep(0.05)
        times, sent = np.array(seen).T
        ends = np.interp(times + WINDOW_S, times, sent)
        most = float((ends - sent)[times + WINDOW_S <= times[-1]].max()) / (RATE_BYTES_PER_S * WINDOW_S)
        assert 0.8 < most <= 1.05
        wire.set_up(False)
        time.sleep(0.5)  # what is lost meanwhile comes again
        wire.set_up(True)
        last = production.snapshot(60)
        assert digest(replica.store(), last) == xxhsum(production.volume())
        assert production.complaints() == []
