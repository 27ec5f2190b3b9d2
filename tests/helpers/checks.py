"""What must hold of a group whose only writer wrote stamped writes: seq n is write n, at every instant."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.hosts import Mount, ask, instant_name, instant_ns
from tests.helpers.load import FSYNC, WRITE, read_log
from tests.helpers.stamps import Plan


def check_image(image: Path, plan: Plan) -> int:
    """The image is exactly the state after write `user.pitfs.seq`; that seq."""
    with image.open("rb") as file:  # once: a name such as `latest` may lead elsewhere a moment later
        seq = int(os.getxattr(file.fileno(), "user.pitfs.seq"))
        plan.check(file.read(), seq)
    return seq


def check_at_times(
    mount: Mount, times_ns: Iterable[int], log: Path, plan: Plan, volume: str = "root"
) -> None:
    """The state at each time has every write acknowledged by then and none begun after it, byte for byte."""
    rows = read_log(log)
    rows = rows[rows["kind"] == WRITE]
    for time_ns in times_ns:
        image = mount.image(instant_name(time_ns), volume)
        seq = check_image(image, plan)
        acknowledged = int(rows["n"][rows["done_ns"] <= time_ns].max(initial=0))
        begun = int(rows["n"][rows["begun_ns"] <= time_ns].max(initial=0))
        assert acknowledged <= seq <= max(begun, acknowledged + 1), (
            instant_name(time_ns),
            acknowledged,
            seq,
            begun,
        )


def random_times(log: Path, count: int, until_ns: int, seed: int = 1) -> list[int]:
    """Times between the first write begun and `until_ns`."""
    first = int(read_log(log)["begun_ns"][0])
    random_ = random.Random(seed)
    return sorted(random_.randrange(first, until_ns) for _ in range(count))


def last_acknowledged(log: Path, kind: int = WRITE) -> int:
    rows = read_log(log)
    return int(rows["n"][rows["kind"] == kind].max(initial=0))


def last_fsynced(log: Path) -> int:
    return last_acknowledged(log, FSYNC)


def check_listing(store: Path) -> dict[str, Any]:
    """Intervals join without gap or overlap, each seq once, and every snapshot is an interval's end."""
    listing: dict[str, Any] = ask("list", store, "--json")
    assert listing["gaps"] == [], listing["gaps"]
    snapshots, intervals = listing["snapshots"], listing["intervals"]
    seqs = [snapshot["seq"] for snapshot in snapshots]
    assert seqs == sorted(set(seqs)), seqs
    instants = [snapshot["instant"] for snapshot in snapshots]
    assert instants == sorted(set(instants))
    assert [interval["to"] for interval in intervals] == instants[1:]
    assert [interval["from"] for interval in intervals] == instants[:-1]
    assert all(interval["granularity_ns"] == 0 for interval in intervals), intervals
    assert np.all(np.diff([instant_ns(name) for name in instants]) > 0)
    return listing
