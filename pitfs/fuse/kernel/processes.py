"""Other processes: running a command, and which ones use a file.

The links under /proc say what a process uses, since the file itself may be on a dead mount.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Final

from pitfs.errors import PitfsError, UsageError

GRACE_S: Final = 3.0  # for a command that is ended to undo what it has done


@dataclass(frozen=True, slots=True)
class FileUser:
    """A process that uses the file `path`, as fuser(1) shows them.

    Attributes:
        how: opened, mapped, working directory, root directory.
    """

    pid: int
    name: str
    path: str
    how: str

    def __str__(self) -> str:
        return f"process {self.pid} {self.name}"


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command in a session of its own: Ctrl-C is for the caller, who undoes what was done."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="surrogateescape", check=False, start_new_session=True,
            stdin=subprocess.DEVNULL, env=environment(),
        )  # fmt: skip
    except FileNotFoundError:
        raise PitfsError(f"{command[0]}: not found: install util-linux and mount") from None


def run_group(command: Sequence[str], output: int | IO[bytes], timeout_s: float | None = None, **more: str) -> int:
    """Runs a command in a process group of its own, without input; a signal or the time's end ends all of the group.

    Returns its exit code, or minus the signal that ended it. `output`: where standard output and error go; `more`: what
    its environment has besides ours.

    Raises:
        UsageError: there is no such program.
        subprocess.TimeoutExpired: it has been ended.
    """
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment() | more,
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise UsageError(f"{command[0]}: can't be run: {error.strerror}: install it, or give its path") from None
    try:
        return process.wait(timeout_s)
    except BaseException:
        try:
            _end_group(process, signal.SIGTERM)
        finally:  # also after a second Ctrl-C
            _end_group(process, signal.SIGKILL)
        raise


def _end_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, number)
        process.wait(GRACE_S)


def environment() -> dict[str, str]:
    """That of commands: cron's PATH lacks the places where losetup and e2fsck are."""
    return {**os.environ, "PATH": f"{os.environ.get('PATH') or os.defpath}:/usr/sbin:/sbin"}


def process_ids() -> list[int]:
    """All processes that there are now, also those of other users."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def processes_opening(paths: Sequence[str], mapped: bool = False) -> list[FileUser]:
    """Other processes that have one of these files open, or if asked mapped; each once."""
    wanted = frozenset(paths)
    return _file_users(lambda path: path in wanted, mapped)


def processes_below(directory: str) -> list[FileUser]:
    """Other processes that use `directory` or a file in it; each once, with the first file that was found."""
    prefix = directory.rstrip("/") + "/"
    return _file_users(lambda path: path == directory or path.startswith(prefix), mapped=True)


def _file_users(matches: Callable[[str], bool], mapped: bool) -> list[FileUser]:
    found = []
    for pid in sorted({*process_ids()} - {os.getpid()}):
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            for how, path in _files_used(f"/proc/{pid}", mapped):
                if matches(path):
                    with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
                        found.append(FileUser(pid, file.read().strip(), path, how))
                    break
    return found


def _files_used(process: str, mapped: bool) -> Iterator[tuple[str, str]]:
    """(how, path) of all files that the process uses."""
    for number in os.listdir(f"{process}/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            yield "opened", os.readlink(f"{process}/fd/{number}").removesuffix(" (deleted)")
    if not mapped:
        return
    yield "working directory", os.readlink(f"{process}/cwd")
    yield "root directory", os.readlink(f"{process}/root")
    with open(f"{process}/maps", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for line in file:
            fields = line.rstrip("\n").split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith("/"):
                yield "mapped", fields[5].removesuffix(" (deleted)")
