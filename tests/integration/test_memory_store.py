"""Memory of what writes a store doesn't grow with the length of an interval, and time does in proportion.

Nor does that of a mount grow with what is read: all caches of all its processes have limits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pitfs.model.transfer import VolumeInfo
from tests.helpers.histories import LongHistory
from tests.helpers.hosts import Mount, instant_name
from tests.helpers.processes import ROOT, resident_bytes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
LIMIT_MIB, GROWTH_MIB = 200, 40

# One process each: the peak is of the whole life of one.
INGEST = """
import json, resource, sys, time
from pathlib import Path
from pitfs.model.transfer import VolumeInfo
from tests.helpers.histories import LongHistory
root, count, streamed = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "streamed"
with LongHistory(root, VolumeInfo("root", 1 << 30, 512)) as history:
    history.full_copy()
    begun = time.process_time()
    history.interval(count, 1 << 20, data_every=64, streamed=streamed, is_open=streamed)
    fed = time.process_time()
    if streamed:
        history.mark()
    done = time.process_time()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"peak_mib": peak / 1024, "fed_s": fed - begun, "closed_s": done - fed}))
"""


def ingest(root: Path, count: int, way: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", INGEST, str(root), str(count), way],
        capture_output=True, text=True, timeout=300, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("way", ["streamed", "transfer"])
def test_an_interval_of_ten_million_writes_takes_no_more_memory_than_one_of_a_million(
    tmp_path: Path, way: str
) -> None:
    short, long = ingest(tmp_path / "short", 10**6, way), ingest(tmp_path / "long", 10**7, way)
    assert long["peak_mib"] < LIMIT_MIB, (short, long)
    assert long["peak_mib"] < short["peak_mib"] + GROWTH_MIB, (short, long)
    assert long["fed_s"] < 20 * short["fed_s"], (short, long)  # CPU seconds: ten, were they exact
    if way == "streamed":
        assert long["closed_s"] < 20 * short["closed_s"], (short, long)


@pytest.mark.fuse
def test_a_mount_whose_caches_are_all_full_stays_within_its_memory(tmp_path: Path) -> None:
    """Blocks of every leaf of several instants, then all of some at once: more than tables and chunks are kept of."""
    with LongHistory(tmp_path / "stores", VolumeInfo("root", 1 << 30, 512)) as history:
        history.full_copy()
        writes = history.interval(10**6, 1 << 20, stride=2, streamed=False)
        store = history.path
    with Mount(store, tmp_path) as mount, ThreadPoolExecutor(16) as threads:
        for turn in range(6):
            fd = os.open(mount.image(instant_name(writes.time_ns(900_000 + turn))), os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
                size, step = (4096, 512 * 512) if turn < 4 else (1 << 20, 1 << 20)
                list(threads.map(lambda at, fd=fd, size=size: os.pread(fd, size, at), range(0, 1 << 30, step)))
            finally:
                os.close(fd)
            assert resident_bytes(mount.pids())["pss"] < LIMIT_MIB << 20
