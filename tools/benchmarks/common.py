"""What all groups of benchmarks share: fio, the bare passthrough, a workspace, interleaved runs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import note

from tests.helpers.loops import force_unmount
from tests.helpers.processes import Daemon, HostError

RUN_S, QUICK_RUN_S = 2, 1
ROUNDS, QUICK_ROUNDS = 9, 5


@dataclass(frozen=True, slots=True)
class Setting:
    """How long and how often to measure; `workspace` is where all files are made, `plot` where a picture goes.

    `most_rounds`: of a group with so many rows that fewer must do.
    """

    workspace: Path
    quick: bool
    plot: Path | None = None
    most_rounds: int = ROUNDS

    @property
    def run_s(self) -> int:
        return QUICK_RUN_S if self.quick else RUN_S

    @property
    def rounds(self) -> int:
        return min(self.most_rounds, QUICK_ROUNDS if self.quick else ROUNDS)


def require_tools() -> None:
    """Exits with one line if something that is needed isn't installed."""
    for tool, package in (("fio", "fio"), ("losetup", "mount"), ("fusermount3", "fuse3")):
        if not shutil.which(tool):
            sys.exit(f"tools/bench: {tool} is missing: run tools/setup, or apt-get install {package}")
    if os.geteuid() != 0:
        sys.exit("tools/bench: needs root, to mount")


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """A directory on a disk (not tmpfs, where fdatasync costs nothing) that is removed at the end."""
    directory = Path(
        tempfile.mkdtemp(prefix="pitfs-bench-", dir=os.environ.get("PITFS_BENCH_DIR", "/var/tmp"))
    )
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def fio(path: Path, **options: Any) -> dict[str, Any]:
    """One job of fio on the file; its `read` or `write` part of the JSON report.

    Raises:
        HostError: fio failed.
    """
    given = {"name": "job", "filename": path, "ioengine": "libaio", "direct": 1, "iodepth": 16,
             "time_based": 1, "norandommap": 1, "randrepeat": 0, "refill_buffers": 1,
             "group_reporting": 1, "output-format": "json"} | options  # fmt: skip
    command = ["fio", *(f"--{key.replace('_', '-') if key == 'output_format' else key}={value}"
                        for key, value in given.items())]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        raise HostError(f"{' '.join(command)}: {done.returncode}\n{done.stdout[-1000:]}{done.stderr[-1000:]}")
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    report: dict[str, Any] = job["read" if "read" in str(given["rw"]) else "write"]
    return report


def per_second(path: Path, **options: Any) -> float:
    return float(fio(path, **options)["iops"])


def bytes_per_second(path: Path, **options: Any) -> float:
    return float(fio(path, **options)["bw_bytes"])


def preallocate(path: Path, size_bytes: int, *, random: bool = True) -> Path:
    """A file whose every block is written and on disk, so that no run pays for allocation."""
    chunk_bytes = 8 << 20
    with path.open("wb") as file:
        for start in range(0, size_bytes, chunk_bytes):
            part = min(chunk_bytes, size_bytes - start)
            file.write(os.urandom(part) if random else bytes(part))
        os.fsync(file.fileno())
    return path


@contextlib.contextmanager
def bare_passthrough(backing: Path, directory: Path) -> Iterator[Path]:
    """The bare server in its own process; yields the path of its file."""
    directory.mkdir(exist_ok=True)
    server = str(Path(__file__).with_name("passthrough.py"))
    daemon = Daemon(
        [sys.executable, server, str(backing), str(directory)], directory.with_suffix(".log"), "bare"
    )
    try:
        with daemon:
            yield directory / "root"
            force_unmount(directory)  # ends the server
    finally:
        force_unmount(directory)


def interleaved(setting: Setting, measure: str, candidates: Mapping[str, Callable[[], float]],
                between: Callable[[], None] = lambda: None) -> dict[str, list[float]]:  # fmt: skip
    """Runs each candidate in turn, round after round, so that what drifts drifts for all."""
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(setting.rounds):
        for name, run in candidates.items():
            between()
            found[name].append(run())
        note(f"{measure}, round {number + 1} of {setting.rounds}: "
             + ", ".join(f"{name} {values[-1]:,.0f}" for name, values in found.items()))  # fmt: skip
    return found


def readahead(directory: Path, kib: int | None = None) -> int:
    """The kernel's readahead of a mount in KiB, after setting it if asked to."""
    device = os.stat(directory).st_dev
    path = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    if kib is not None:
        path.write_text(str(kib))
    return int(path.read_text())
