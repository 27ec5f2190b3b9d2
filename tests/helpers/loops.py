"""Loop devices and filesystems on them, and what is left of a mount when its daemon is dead."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.helpers.processes import HostError, run


def is_mounted(directory: Path) -> bool:
    """Whether something is mounted exactly there; never asks the filesystem itself, which may hang."""
    wanted = os.path.realpath(directory.parent) + "/" + directory.name
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        return any(line.split()[4].encode().decode("unicode_escape") == wanted for line in file)


def abort_fuse(directory: Path) -> None:
    """Ends a FUSE connection from the kernel's side, so that nobody waits on it any more."""
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        for line in file:
            fields = line.split()
            if fields[4] == str(directory) and " - fuse" in line:
                abort = Path(f"/sys/fs/fuse/connections/{fields[2].split(':')[1]}/abort")
                with contextlib.suppress(OSError):
                    abort.write_text("1")


def force_unmount(directory: Path) -> None:
    """Takes down whatever is mounted there, alive or dead."""
    for attempt in range(20):
        if not is_mounted(directory):
            return
        if attempt >= 3:
            abort_fuse(directory)
        flags = ["-l"] if attempt >= 3 else []
        subprocess.run(["umount", *flags, str(directory)], capture_output=True, check=False, timeout=30)
        time.sleep(0.05)
    raise HostError(f"{directory} can't be unmounted")


@contextlib.contextmanager
def LoopDevice(path: Path, *, direct_io: bool = True, read_only: bool = False) -> Iterator[Path]:
    """A loop device over the file; yields its path (/dev/loopN)."""
    command = ["losetup", "--find", "--show", f"--direct-io={'on' if direct_io else 'off'}"]
    device = Path(run([*command, *(["--read-only"] if read_only else []), path]).stdout.strip())
    try:
        yield device
    finally:
        run(["losetup", "-d", device], accept=(0, 1))


@contextlib.contextmanager
def MountedFilesystem(
    source: Path, directory: Path, kind: str, options: Sequence[str] = ()
) -> Iterator[Path]:
    """Mounts a device; unmounts on exit, lazily if it must be."""
    directory.mkdir(exist_ok=True)
    run(["mount", "-t", kind, *(["-o", ",".join(options)] if options else []), source, directory])
    try:
        yield directory
    finally:
        done = subprocess.run(["umount", str(directory)], capture_output=True, check=False, timeout=60)
        if done.returncode:
            force_unmount(directory)


def free_file(path: Path, size_bytes: int) -> Path:
    """A sparse file of that size."""
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return path


def fill(ballast: Path, leave_bytes: int = 0) -> None:
    """Fills a filesystem with one file but for that much; remove the file to make room again."""
    with ballast.open("ab", buffering=0) as file:
        free = os.statvfs(ballast).f_bavail * os.statvfs(ballast).f_frsize - leave_bytes
        if free > 0 and leave_bytes:
            os.posix_fallocate(file.fileno(), 0, free)
        for size in () if leave_bytes else (1 << 20, 1 << 16, 1 << 12, 1 << 10):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass
        os.fsync(file.fileno())
