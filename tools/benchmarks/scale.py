"""Group `scale`: what a start costs a store of a million intervals, against one of a thousand: time and memory.

The stores are those of tools/make-store; they take 2 GB and two million inodes, and some minutes to make. With
`python tools/benchmarks/scale.py STORE` the figures of a store that is there are printed.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from common import Setting
from report import Measure, at_most, note, plain

from tests.helpers.histories import START_NS, long_store
from tests.helpers.hosts import Mount, instant_name
from tests.helpers.processes import ROOT, pitfs_command, resident_bytes

INTERVALS, QUICK_INTERVALS, FEW = 10**6, 20_000, 1000
ROUNDS: Final = 3
GOAL_S: Final = 1.0
GOAL_MIB: Final = 10.0  # more than with the short history
DAY: Final = 8640  # intervals of 10 s
GOAL_PRUNE_S, GOAL_PRUNE_MIB = 10.0, 200.0
FIRST_NAMES: Final = 1000
HOUR_NS: Final = 3600 * 10**9
SECOND_NS: Final = 10**9

# A process of its own: the peak is of a whole life, and nothing is in its caches.
RECONNECT: Final = """
import json, sys, time
from pathlib import Path
from pitfs.model.transfer import Hello
from pitfs.store.ingest import Ingest
from pitfs.store.opening import read_store_info
info, begun = read_store_info(sys.argv[1]), time.perf_counter()
ingest = Ingest(str(Path(sys.argv[1]).parent), Hello(info.group, info.history, info.volumes))
ingest.welcome()
took = time.perf_counter() - begun
ingest.close()
(peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([took, int(peak)]))  # the system's maxrss has that of the process that started this one in it
"""
# The command in this one's place: what the system counts of it is counted of the child.
COMMAND: Final = """
import json, resource, subprocess, sys, time
begun = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
took = time.perf_counter() - begun
print(json.dumps([took, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))
"""

# The newest intervals, or snapshots, of a store are brought to the next step of a policy.
PRUNE: Final = """
import itertools, json, sys, time
from pitfs.store.retention.levels import Remove, Thin
from pitfs.store.retention.pruner import Pruner
from pitfs.store.store import Store
path, what, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
store = Store.open(path)
newest = [each.id for each in itertools.islice(store.newest_snapshots(), count + 1)]
store.close()
if what == "hourly":
    kept = newest[::360]
    actions = [Remove(after, before, "retention: measured") for before, after in itertools.pairwise(kept)]
else:
    granularity_ns = None if what == "snapshots" else 1_000_000
    actions = [Thin(each, granularity_ns, "retention: measured") for each in newest[:-1]]
begun = time.perf_counter()
with Pruner(path) as pruner:
    pruner.apply(actions)
took = time.perf_counter() - begun
(peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([took, int(peak)]))
"""

Found = dict[str, tuple[float, float]]  # what was done -> seconds, MiB


def run(setting: Setting) -> list[Measure]:
    many = QUICK_INTERVALS if setting.quick else INTERVALS
    found = []
    for intervals in (FEW, many):
        note(f"a store of {intervals} intervals …")
        store = long_store(setting.workspace / str(intervals), intervals, min(DAY + 100, intervals // 2))
        found.append(measured(store, setting))
    return [*rows(found[0], found[1]), *pruned(store)]


def pruned(store: Path) -> list[Measure]:
    """What a day's worth of intervals of 10 s costs to prune, from step to step."""
    measures = []
    for what in ("1 ms", "snapshots", "hourly"):
        note(f"pruning {DAY} intervals to {what} …")
        took_s, mib = child(PRUNE, str(store), what, str(DAY))
        measures.append(at_most(f"pruning {DAY} intervals to {what}", took_s, "s", GOAL_PRUNE_S))
        measures.append(at_most(f"pruning {DAY} intervals to {what}: memory", mib, "MiB", GOAL_PRUNE_MIB))
    return measures


def rows(few: Found, many: Found) -> list[Measure]:
    measures = []
    for name, (took_s, mib) in many.items():
        goal_s = GOAL_S if name != "read the whole root" else None
        measures.append(at_most(name, took_s, "s", goal_s) if goal_s else plain(name, took_s, "s"))
        measures.append(at_most(f"{name}: memory above that of {FEW}", mib - few[name][1], "MiB", GOAL_MIB))
    return measures


def measured(store: Path, setting: Setting) -> Found:
    """Medians of each."""
    from_ns = START_NS + 200 * SECOND_NS
    bounds = ["--from", instant_name(from_ns), "--to", instant_name(from_ns + HOUR_NS)]
    return {
        "reconnect: open the store for writing, and the welcome": repeated(lambda: child(RECONNECT, str(store))),
        "pitfs list, an hour": repeated(lambda: child(COMMAND, *pitfs_command(), "list", str(store), *bounds)),
        "pitfs status": repeated(lambda: child(COMMAND, *pitfs_command(), "status", str(store))),
        **mounted(store, setting.workspace),
    }


def repeated(once: Callable[[], tuple[float, float]]) -> tuple[float, float]:
    found = [once() for _ in range(ROUNDS)]
    return statistics.median(s for s, _ in found), max(mib for _, mib in found)


def child(program: str, *arguments: str) -> tuple[float, float]:
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    took_s, peak_kib = json.loads(done.stdout)
    return took_s, peak_kib / 1024


def mounted(store: Path, directory: Path) -> Found:
    """Mounting, then what comes first, then all of the root: with the memory of all its processes after each."""
    found, begun = {}, time.perf_counter()
    with Mount(store, directory) as mount:

        def then(name: str, begun: float) -> None:
            found[name] = time.perf_counter() - begun, resident_bytes(mount.pids())["pss"] / (1 << 20)

        then("mount", begun)
        begun = time.perf_counter()
        with os.scandir(mount.path) as names:
            for _ in zip(range(FIRST_NAMES), names, strict=False):
                pass
        then(f"the first {FIRST_NAMES} names of the root", begun)
        begun = time.perf_counter()
        days = os.listdir(mount.path / "times")
        minutes = os.listdir(mount.path / "times" / days[0])
        seconds = os.listdir(mount.path / "times" / days[0] / minutes[0])
        assert seconds
        then("times/, its first day and minute", begun)
        begun = time.perf_counter()
        image = next((mount.path / "latest").iterdir())
        image.read_bytes()
        then("the image of latest", begun)
        begun = time.perf_counter()
        with os.scandir(mount.path) as names:
            count = sum(1 for _ in names)
        assert count > 3
        then("read the whole root", begun)
    return found


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    here = Path(sys.argv[1]).resolve()
    for what, (seconds_taken, mebibytes) in measured(here, Setting(here.parent, False, None)).items():
        print(f"{what:<60}{seconds_taken:8.3f} s{mebibytes:8.1f} MiB")
