"""With both hosts' processes: what production took is what `pitfs verify` finds, also after a kill and a restart."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.helpers.hosts import Production, Replica
from tests.helpers.processes import pitfs_command, run, wait_until

SIZE = 8 << 20


def write_somewhere(path: Path) -> None:
    with open(path, "r+b", buffering=0) as file:
        for _ in range(20):
            os.pwrite(file.fileno(), os.urandom(5000), int.from_bytes(os.urandom(3)) % (SIZE - 5000))


def test_each_snapshot_is_verified_whatever_ended_the_shipper(tmp_path: Path) -> None:
    volumes = {"root": SIZE, "log": SIZE}
    with (
        Replica(tmp_path) as replica,
        Production(tmp_path, volumes, port=replica.port, interval="1h") as production,
    ):
        for ending in ("kill", "restart", "none"):
            for name in volumes:
                write_somewhere(production.volume(name))
            instant = production.snapshot()
            store = str(replica.store("g"))
            said = run([*pitfs_command(), "verify", store, "latest"]).stdout
            assert said.splitlines() == [f"{name}: equal at {instant}" for name in volumes]
            if ending == "kill":
                (shipper,) = production.pids("pitfs-shipper")
                os.kill(shipper, signal.SIGKILL)
                wait_until(lambda old=shipper: production.pids("pitfs-shipper") not in ([], [old]), "a new shipper")
            elif ending == "restart":
                production.terminate()
                production.restart()
