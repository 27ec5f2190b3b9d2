"""Debian's PostgreSQL: a cluster in a directory, its server in the foreground as user postgres, clients.

with Cluster(directory / "cluster", log) as cluster:       # made if there is none; recovered if it must be
    cluster.run("pgbench", "--initialize")
    cluster.query("SELECT 1")
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.helpers.processes import HostError, wait_until

INSTALLED: Final = Path("/usr/lib/postgresql")  # Debian's; below it the versions
USER: Final = "postgres"  # the server refuses to run as root
START_TIMEOUT_S: Final = 60
PROGRAM_TIMEOUT_S: Final = 300


def missing() -> str:
    """Why there is no PostgreSQL here; empty if there is."""
    if not list(INSTALLED.glob("*/bin/postgres")):
        return "PostgreSQL isn't installed (apt-get install postgresql)"
    try:
        pwd.getpwnam(USER)
    except KeyError:
        return f"there is no user '{USER}' to run the server as"
    return ""


@contextlib.contextmanager
def open_directory() -> Iterator[Path]:
    """A new directory that the server's user gets through: pytest's own are root's alone.

    Also short: the path of a socket has room for 107 bytes.
    """
    directory = Path(tempfile.mkdtemp(prefix="pitfs-pg-"))
    try:
        directory.chmod(0o711)
        yield directory
    finally:
        shutil.rmtree(directory)


class Cluster:
    """A running server over `data`; as a context manager it starts, and ends by a fast shutdown.

    Args:
        data: the cluster's directory; made by initdb if it isn't there.
        log: what server and programs say, appended.
        settings: of the server, beside those that keep it to itself.
        initdb: further arguments of it.
    """

    def __init__(self, data: Path, log: Path, settings: Mapping[str, str] = {},
                 initdb: Sequence[str] = ()) -> None:  # fmt: skip
        self.data, self.log, self.initdb = data, log, tuple(initdb)
        self.settings = {"listen_addresses": "", **settings}
        self._user = pwd.getpwnam(USER)
        self._programs = max(INSTALLED.glob("*/bin"), key=lambda path: float(path.parent.name))
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self.sockets = stack.enter_context(open_directory())
            os.chown(self.sockets, self._user.pw_uid, self._user.pw_gid)
            if not self.data.exists():
                self.data.mkdir(mode=0o700)
                os.chown(self.data, self._user.pw_uid, self._user.pw_gid)
                self.run("initdb", "--no-locale", "--encoding=UTF8", *self.initdb, "-D", str(self.data))
            stack.callback(self._kill)
            self._serve()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        with self._stack:
            if kind is None:
                self.stop()

    def _serve(self) -> None:
        options = [f"--{name}={value}" for name, value in self.settings.items()]
        server = self.start("postgres", "-D", str(self.data), *options)
        self._server = server
        wait_until(
            lambda: server.poll() is not None or self.start("pg_isready").wait(30) == 0,
            "PostgreSQL answers",
            START_TIMEOUT_S,
            0.1,
        )
        if server.poll() is not None:
            raise HostError(f"PostgreSQL ended with {server.returncode}:\n{self.tail()}")

    def stop(self) -> None:
        """A fast shutdown.

        Raises:
            HostError: the server ended with an error.
        """
        assert self._server is not None
        self._server.send_signal(signal.SIGINT)
        if code := self._server.wait(PROGRAM_TIMEOUT_S):
            raise HostError(f"PostgreSQL ended with {code}:\n{self.tail()}")

    def _kill(self) -> None:
        if self._server is not None and self._server.poll() is None:
            self._server.send_signal(signal.SIGQUIT)  # an immediate shutdown: its children end with it
            self._server.wait(PROGRAM_TIMEOUT_S)

    def environment(self) -> dict[str, str]:
        """What a client needs to find the server, also one that runs as root."""
        return {"PATH": f"{self._programs}:/usr/bin:/bin", "LC_ALL": "C", "PGHOST": str(self.sockets),
                "PGDATABASE": "postgres", "PGUSER": USER}  # fmt: skip

    def start(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Starts a program of PostgreSQL's as its user; what it says goes to the log."""
        with self.log.open("ab") as log:
            # The sockets' place isn't an option: only the server knows that one.
            sockets = [f"--unix_socket_directories={self.sockets}"] if program == "postgres" else []
            return subprocess.Popen(
                [self._programs / program, *arguments, *sockets], cwd="/", user=self._user.pw_uid,
                group=self._user.pw_gid, extra_groups=(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, env=self.environment(),
            )  # fmt: skip

    def wait(self, process: subprocess.Popen[bytes], what: str) -> None:
        """Until it has ended well.

        Raises:
            HostError: it ended with an error.
        """
        if code := process.wait(PROGRAM_TIMEOUT_S):
            raise HostError(f"{what} ended with {code}:\n{self.tail()}")

    def run(self, program: str, *arguments: str) -> None:
        """Runs a program of PostgreSQL's to its end.

        Raises:
            HostError: it ended with an error.
        """
        self.wait(self.start(program, *arguments), program)

    def query(self, sql: str) -> list[list[str]]:
        """The rows that a statement returns, as text.

        Raises:
            HostError: it failed.
        """
        done = subprocess.run(
            [self._programs / "psql", "--no-psqlrc", "--csv", "--tuples-only", "--set=ON_ERROR_STOP=1",
             f"--command={sql}"],
            capture_output=True, text=True, check=False, timeout=PROGRAM_TIMEOUT_S, env=self.environment(),
        )  # fmt: skip
        if done.returncode:
            raise HostError(f"{sql}: {done.stderr.strip()}")
        return [line.split(",") for line in done.stdout.splitlines()]

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]
