"""Daemons under test: started with a mark in their environment, found and ended by it, never by name.

The mark is inherited over fork, setsid and exec, so a daemon's helpers (splitter, shipper, a mount that
went to the background) are found also after their parent is gone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

MARK: Final = "PITFS_TEST_MARK"
READY_TIMEOUT_S: Final = 30.0
END_TIMEOUT_S: Final = 30.0
COMMAND_TIMEOUT_S: Final = 120.0
ROOT: Final = Path(__file__).resolve().parents[2]


class HostError(Exception):
    """A daemon or command didn't do what the contract says; the message has the end of its log."""


def pitfs_command(name: str = "pitfs") -> list[str]:
    """The installed script beside the running interpreter, else the module itself."""
    script = Path(sys.executable).parent / name
    if script.exists():
        return [str(script)]
    module = {"pitfs": "pitfs.cli.main", "mount.pitfs": "pitfs.cli.mount", "umount.pitfs": "pitfs.cli.umount"}[name]
    return [sys.executable, "-m", module]


def run(command: Sequence[str | os.PathLike[str]], *, accept: tuple[int, ...] = (0,),
        timeout_s: float = COMMAND_TIMEOUT_S) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Runs a command to its end and hands over what it said.

    Raises:
        HostError: it ended with a code that isn't in `accept`.
    """
    words = [os.fspath(part) for part in command]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=timeout_s,
        cwd=ROOT, check=False,
    )  # fmt: skip
    if done.returncode not in accept:
        raise HostError(
            f"{' '.join(words)}: exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        )
    return done


def wait_until(
    holds: Callable[[], object], what: str, timeout_s: float = 20.0, every_s: float = 0.05
) -> None:
    """Polls until `holds` says yes.

    Raises:
        HostError: it didn't within the time.
    """
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            raise HostError(f"not within {timeout_s:g} s: {what}")
        time.sleep(every_s)


def command_name(pid: int) -> str:
    """The process's comm (at most 15 characters), empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def pids_with(mark: str) -> list[int]:
    """All living processes started with that mark, oldest first; zombies don't count."""
    found = []
    wanted = f"{MARK}={mark}".encode()
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            if wanted in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                found.append(int(name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return sorted(found)


def resident_bytes(pids: Sequence[int]) -> dict[str, int]:
    """Sums over the processes: `pss` (shared pages counted by share) and `rss` (counted in each)."""
    total = {"pss": 0, "rss": 0}
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for line in text.splitlines():
            key = line.split(":")[0].lower()
            if key in total:
                total[key] += int(line.split()[1]) * 1024
    return total


def cpu_seconds(pids: Sequence[int]) -> float:
    """User and system time of the processes so far, with children that they have waited for."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            # Behind the name, which may hold anything; utime, stime, cutime, cstime are fields 14 to 17.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


class Daemon:
    """A foreground program that prints `ready`; its standard error goes to a file that grows over restarts.

    As a context manager it starts on entry and is ended on exit, with SIGKILL if it must be.
    """

    stdin: int = subprocess.DEVNULL  # PIPE for one that ends when whoever started it is gone

    def __init__(self, command: Sequence[str], log: Path, name: str) -> None:
        self.command = list(command)
        self.log = log
        self.name = name
        self.mark = uuid.uuid4().hex
        self.process: subprocess.Popen[str] | None = None
        self.said: list[str] = []
        self._ready = threading.Event()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.clean_up()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self.clean_up()

    def start(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Starts it and waits for `ready`.

        Raises:
            HostError: it ended first, or wasn't ready in time.
        """
        self._ready = threading.Event()
        self.said = []
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdin=self.stdin, stdout=subprocess.PIPE, stderr=log, text=True,
                cwd=ROOT, env=os.environ | {MARK: self.mark}, start_new_session=True,
            )  # fmt: skip
        given = (self.process, self._ready, self.said)
        self._listener = threading.Thread(target=self._listen, args=given, daemon=True)
        self._listener.start()
        deadline = time.monotonic() + timeout_s
        while not self._ready.wait(0.05):
            if self.process.poll() is not None:
                raise HostError(
                    f"{self.name} ended with {self.process.returncode} before ready:\n{self.tail()}"
                )
            if time.monotonic() > deadline:
                raise HostError(f"{self.name} isn't ready after {timeout_s:g} s:\n{self.tail()}")

    @staticmethod
    def _listen(process: subprocess.Popen[str], ready: threading.Event, said: list[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                said.append(line.rstrip("\n"))
                if line.strip() == "ready":
                    ready.set()

    def pids(self, comm: str | None = None) -> list[int]:
        """Living processes of it, all or those with that comm name."""
        return [pid for pid in pids_with(self.mark) if comm is None or command_name(pid) == comm]

    def terminate(self, timeout_s: float = END_TIMEOUT_S, *, though_in_use: bool = False) -> None:
        """SIGTERM; must end with exit code 0 and leave no process.

        Args:
            though_in_use: with the second signal, which ends it in any case.

        Raises:
            HostError: it didn't.
        """
        assert self.process is not None
        self.process.terminate()
        if self.process.stdin is not None:  # that tells it
            self.process.stdin.close()
        if though_in_use:
            self.process.send_signal(signal.SIGINT)
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise HostError(f"{self.name} goes on {timeout_s:g} s after SIGTERM:\n{self.tail()}") from None
        if code != 0:
            raise HostError(f"{self.name} ended with {code} after SIGTERM:\n{self.tail()}")
        wait_until(lambda: not self.pids(), f"{self.name} leaves no process behind", 5)
        self._listener.join(5)

    def kill(self) -> None:
        """SIGKILL to all its processes at once, as an out-of-memory killer or a power cut would."""
        deadline = time.monotonic() + END_TIMEOUT_S
        while pids := self.pids():
            # Stopped first: none sees another's death, so none can close anything in order.
            for number in (signal.SIGSTOP, signal.SIGKILL):
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
            if self.process is not None:
                self.process.poll()
            if time.monotonic() > deadline:
                raise HostError(f"{self.name}: processes {pids} outlive SIGKILL (a hung mount?)")
            time.sleep(0.01)
        if self.process is not None:
            self.process.wait(END_TIMEOUT_S)
            self._listener.join(5)

    def clean_up(self) -> None:
        """Ends it whatever its state; never raises for one that is gone."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.send_signal(signal.SIGINT)  # in any case
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        self.kill()

    def logged(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def tail(self) -> str:
        return self.logged()[-3000:]

    def complaints(self) -> list[str]:
        """Lines of the log above info."""
        words = ("WARN", "ERROR", "CRITICAL", "Traceback", "warning", "error:")
        return [line for line in self.logged().splitlines() if any(word in line for word in words)]

    def resident_bytes(self) -> dict[str, int]:
        return resident_bytes(self.pids())
