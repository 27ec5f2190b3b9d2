"""The two hosts and the mount, as the contract describes them: configured, started, asked, killed.

with Replica(tmp) as replica, Production(tmp, {"root": 64 << 20}, port=replica.port) as production:
    os.pwrite(...)                                   # production.volume("root")
    instant = production.snapshot()
    with Mount(replica.store("g"), tmp) as mount:
        mount.image(instant).read_bytes()
"""

from __future__ import annotations

import calendar
import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.helpers.loops import force_unmount, free_file, is_mounted
from tests.helpers.processes import (
    END_TIMEOUT_S,
    MARK,
    READY_TIMEOUT_S,
    ROOT,
    Daemon,
    HostError,
    pids_with,
    pitfs_command,
    run,
    wait_until,
)

GROUP = "g"
# One that is removing much of what was written to its scratch can't be interrupted, however busy the disk is.
KILL_TIMEOUT_S = 120.0


def free_port() -> int:
    """A TCP port of loopback that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def instant_name(time_ns: int) -> str:
    """UTC nanoseconds -> canonical instant, written by hand so that it checks pitfs's own."""
    seconds, rest = divmod(time_ns, 10**9)
    return time.strftime("%Y-%m-%dT%H-%M-%S", time.gmtime(seconds)) + f".{rest:09d}Z"


def instant_ns(name: str) -> int:
    """The inverse of instant_name."""
    return calendar.timegm(time.strptime(name[:19], "%Y-%m-%dT%H-%M-%S")) * 10**9 + int(name[20:29])


class Replica(Daemon):
    """`pitfs receive` on loopback, its stores under tmp/stores (or `root`); without TLS unless told.

    Args:
        within: a command to run it by, such as `Wire.within_replica`.
    """

    def __init__(
        self,
        tmp: Path,
        port: int | None = None,
        *,
        root: Path | None = None,
        host: str = "127.0.0.1",
        within: Sequence[str] = (),
        tls: Sequence[str] = ("--insecure",),
    ) -> None:
        self.root = root or tmp / "stores"
        self.root.mkdir(exist_ok=True)
        self.port = port or free_port()
        listen = f"{host}:{self.port}"
        super().__init__(
            [*within, *pitfs_command(), "receive", "--root", str(self.root), "--listen", listen, *tls],
            tmp / "receive.log", "receive",
        )  # fmt: skip

    def store(self, group: str = GROUP) -> Path:
        return self.root / group

    def listing(self, group: str = GROUP) -> dict[str, Any]:
        listing: dict[str, Any] = ask("list", self.store(group), "--json")
        return listing


class Production(Daemon):
    """`pitfs protect` with a configuration written to tmp/NAME.toml.

    Args:
        volumes: name -> size in bytes (a sparse backing is made) or the path of a backing that exists.
        rate: cap of the link. A high one also fixes the decision at every write, where the measured rate of a
            busy machine might decide for snapshots only.
        within: a command to run it by, such as `Wire.within_production`.
    """

    def __init__(self, tmp: Path, volumes: Mapping[str, int | Path], *, port: int, interval: str = "2s",
                 mode: str = "dynamic", rate: str | None = None, capacity: str | None = None,
                 on_full: str | None = None, on_disconnect: str | None = None,
                 block_sizes: Mapping[str, int] | None = None,
                 group: str = GROUP, host: str = "127.0.0.1", state: Path | None = None,
                 within: Sequence[str] = (),
                 tls: Sequence[str] = ("insecure = true",)) -> None:  # fmt: skip
        self.group, self.host, self.port = group, host, port
        self._answered: subprocess.Popen[str] | None = None  # the start whose shipper answered already
        self.mountpoint = tmp / f"{group}.volumes"
        self.mountpoint.mkdir(exist_ok=True)
        self.state = state or tmp / f"{group}.state"
        self.backings: dict[str, Path] = {}
        for name, backing in volumes.items():
            if isinstance(backing, int):
                backing = free_file(tmp / f"{group}.{name}.backing", backing)
            self.backings[name] = backing
        self.config = tmp / f"{group}.toml"
        lines = ["[group]", f'name = "{group}"', f'state = "{self.state}"']
        for name, path in self.backings.items():
            lines += [f"[volumes.{name}]", f'backing = "{path}"']
            if block_sizes and name in block_sizes:
                lines += [f"block_size = {block_sizes[name]}"]
        lines += ["[splitter]", f'mountpoint = "{self.mountpoint}"', "[replication]"]
        lines += [f'replica = "{host}:{port}"', f'mode = "{mode}"', f'interval = "{interval}"']
        lines += [f'rate = "{rate}"'] if rate else []
        lines += [f'on_disconnect = "{on_disconnect}"'] if on_disconnect else []
        journal = [f'capacity = "{capacity}"'] if capacity else []
        journal += [f'on_full = "{on_full}"'] if on_full else []
        lines += ["[journal]", *journal] if journal else []
        lines += ["[tls]", *tls]
        self.config.write_text("\n".join(lines) + "\n")
        super().__init__(
            [*within, *pitfs_command(), "protect", str(self.config)], tmp / f"{group}.protect.log", "protect"
        )

    def volume(self, name: str = "root") -> Path:
        return self.mountpoint / name

    def snapshot(self, timeout_s: float = 120) -> str:
        """Closes the interval and waits for the replica; its canonical instant."""
        self.wait_for_shipper()
        return self._said_instant(run([*pitfs_command(), "snapshot", self.config], timeout_s=timeout_s))

    def bookmark(self, name: str) -> str:
        return self._said_instant(run([*pitfs_command(), "bookmark", self.config, name]))

    def _said_instant(self, done: subprocess.CompletedProcess[str]) -> str:
        said = done.stdout.strip()
        if len(said) != 30 or not said.endswith("Z"):
            raise HostError(f"{self.name} printed {said!r}, not a canonical instant")
        return said

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = ask("status", self.config, "--json")
        return status

    def restart(self) -> None:
        """Starts it again after terminate() or kill(), over whatever is left."""
        self.start()

    def wait_for_shipper(self) -> None:
        """Until the second process answers: `ready` only says that writes are accepted."""
        if self.process is self._answered:
            return
        wait_until(
            lambda: run([*pitfs_command(), "status", self.config], accept=(0, 1)).returncode == 0,
            "status answers",
            20,
            0.1,
        )
        self._answered = self.process

    def wait_protected(self, time_ns: int, timeout_s: float = 60) -> None:
        """Until the replica is protected through that time."""

        def reached() -> bool:
            through = self.status()["protected_through"]
            return through is not None and instant_ns(through) >= time_ns

        wait_until(reached, f"protected through {instant_name(time_ns)}", timeout_s, 0.2)

    def clean_up(self) -> None:
        super().clean_up()
        force_unmount(self.mountpoint)


class Mount:
    """mount.pitfs of a store, at tmp/mount unless told; unmounted on exit, by force if it must be."""

    def __init__(self, store: Path, tmp: Path, *, name: str = "mount", options: str = "") -> None:
        self.store = store
        self.path = tmp / name
        self.path.mkdir(exist_ok=True)
        self.options = options
        self.command = pitfs_command("mount.pitfs")
        self.log = tmp / f"{name}.log"
        self.mark = ""
        self.process: Daemon | None = None

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

    def image(self, instant: str, volume: str = "root") -> Path:
        """The image of a volume at an instant, or at any other way to say a time."""
        return self.path / instant / f"{volume}.img"

    def start(self) -> None:
        """Mounts; the helper returns when the mount answers.

        Raises:
            HostError: it failed, or nothing is mounted when it returns.
        """
        command = [*self.command, str(self.store), str(self.path)]
        command += ["-o", self.options] if self.options else []
        self.mark = self.mark or os.urandom(16).hex()
        with self.log.open("ab") as log:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=READY_TIMEOUT_S, cwd=ROOT,
                env=os.environ | {MARK: self.mark}, check=False,
            )  # fmt: skip
        if done.returncode or not is_mounted(self.path):
            raise HostError(f"mount.pitfs ended with {done.returncode}: {self.logged()[-2000:]}")

    def pids(self) -> list[int]:
        return pids_with(self.mark) if self.mark else []

    def supervisor(self) -> int:
        """The process that started those that serve."""
        (supervisor,) = self._of_parent(lambda parent, pids: parent not in pids)
        return supervisor

    def workers(self) -> list[int]:
        """The processes that serve."""
        return self._of_parent(lambda parent, pids: parent in pids)

    def _of_parent(self, wanted: Callable[[int, list[int]], bool]) -> list[int]:
        pids, found = self.pids(), []
        for pid in pids:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                status = Path(f"/proc/{pid}/stat").read_text()
                if wanted(int(status.rpartition(")")[2].split()[1]), pids):
                    found.append(pid)
        return found

    def unmount(self) -> None:
        """As a user does; the daemon ends with it.

        Raises:
            HostError: umount was refused, or a process is left.
        """
        run(["umount", self.path])
        wait_until(lambda: not self.pids(), "the mount's daemon ends with umount", END_TIMEOUT_S)

    def kill(self) -> None:
        """SIGKILL to all its processes, also to one that another starts meanwhile; the dead mount stays."""

        def none_left() -> bool:
            pids = self.pids()
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not pids

        wait_until(none_left, "the killed mount is gone", KILL_TIMEOUT_S)

    def clean_up(self) -> None:
        force_unmount(self.path)
        self.kill()

    def logged(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def complaints(self) -> list[str]:
        return [line for line in self.logged().splitlines() if line.strip()]

    def instants(self) -> list[str]:
        """The snapshots' directories, oldest first."""
        return sorted(name for name in os.listdir(self.path) if len(name) == 30 and name.endswith("Z"))


def ask(command: str, *arguments: str | Path) -> Any:
    """`pitfs COMMAND … --json`, decoded."""
    return json.loads(run([*pitfs_command(), command, *arguments]).stdout)


def digest(store: Path, instant: str, volume: str = "root") -> str:
    """What `pitfs digest` says: xxh3_128, 32 hex digits."""
    return run([*pitfs_command(), "digest", store, instant, volume]).stdout.split()[0]


def xxhsum(path: Path) -> str:
    """The same of a file, by the peer's own tool."""
    return run(["xxhsum", "-H2", path]).stdout.split()[0]
