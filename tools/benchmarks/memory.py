"""What the mounts hold in memory while they are measured."""

from __future__ import annotations

import collections
import contextlib
import os
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from report import Measure, at_most, plain

from tests.helpers.processes import MARK, resident_bytes

SAMPLE_S: Final = 1.0
MIB: Final = 1 << 20
GOAL_BYTES: Final = 200 << 20
RUN: Final = "PITFS_BENCH_RUN"  # in the environment of all that a run starts
_PROGRAM: Final = b"mount.pitfs"


class MountMemory:
    """The greatest sums over the processes of one mount, of all mounts that were seen; bytes."""

    def __init__(self) -> None:
        self.rss_bytes = self.pss_bytes = 0
        self._mark = uuid.uuid4().hex
        self._ended = threading.Event()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Looks at all mounts that are made meanwhile, by whoever, once a second; `sample` for shorter ones."""
        os.environ[RUN] = self._mark
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()
            del os.environ[RUN]

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            self.sample()

    def sample(self) -> None:
        for pids in self._mounts():
            found = resident_bytes(pids)
            self.rss_bytes = max(self.rss_bytes, found["rss"])
            self.pss_bytes = max(self.pss_bytes, found["pss"])

    def measures(self) -> list[Measure]:
        """Rows of what was seen; none if no mount was."""
        if not self.rss_bytes:
            return []
        return [
            at_most(
                "memory of a mount, RSS of all its processes", self.rss_bytes / MIB, "MiB", GOAL_BYTES / MIB
            ),
            plain("memory of a mount, PSS", self.pss_bytes / MIB, "MiB"),
        ]

    def _mounts(self) -> list[list[int]]:
        """Processes by mount: those that inherited the same mark."""
        wanted, mark = f"{RUN}={self._mark}".encode(), f"{MARK}=".encode()
        found: dict[bytes, list[int]] = collections.defaultdict(list)
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):  # gone meanwhile
                environment = Path(f"/proc/{name}/environ").read_bytes().split(b"\0")
                if wanted in environment and _PROGRAM in Path(f"/proc/{name}/cmdline").read_bytes():
                    marks = [entry for entry in environment if entry.startswith(mark)]
                    found[marks[0] if marks else b""].append(int(name))
        return list(found.values())
