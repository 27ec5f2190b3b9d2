"""What others serve the same image with: a bare server, qemu-storage-daemon, borg mount, restic mount.

Each peer yields the path of a file that it serves, with the content of the flat copy (that of the qcow2 chain
differs where the chain's layers were written: the places of the same writes). Nothing is kept outside of the
workspace. A peer that isn't installed says so, and is left out.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from common import bare_passthrough
from rewriting import WRITE_BYTES, Rewriting

from tests.helpers.loops import force_unmount, is_mounted
from tests.helpers.processes import HostError, run, wait_until

CHAIN_LAYERS: Final = 64
ARCHIVE: Final = "a"
MOUNT_TIMEOUT_S: Final = 60
BUILD_TIMEOUT_S: Final = 600
BARE, RAW, CHAIN, BORG, RESTIC = (
    "bare pyfuse3 server",
    "qemu-storage-daemon, raw",
    f"qemu-storage-daemon, qcow2 chain of {CHAIN_LAYERS}",
    "borg mount",
    "restic mount",
)


@dataclass(frozen=True, slots=True)
class Peer:
    """One to compare with.

    Attributes:
        programs: what it needs in PATH; `package`: Debian's that has them.
        serve: (directory of its own, flat copy, writes since the third snapshot) -> the served file.
        slow: so slow that a run is cut off after some seconds, and isn't repeated as often.
    """

    name: str
    programs: tuple[str, ...]
    package: str
    serve: Callable[[Path, Path, Rewriting], contextlib.AbstractContextManager[Path]]
    slow: bool = False

    def missing(self) -> str:
        """Why it can't be measured here; empty if it can."""
        lacking = [program for program in self.programs if not shutil.which(program)]
        return f"{', '.join(lacking)} isn't installed: apt-get install {self.package}" if lacking else ""


@contextlib.contextmanager
def serving(command: Sequence[str | Path], log: Path, mounted: Path,
            environment: Mapping[str, str] = {}) -> Iterator[None]:  # fmt: skip
    """A foreground program that mounts something; ended by unmounting it.

    Raises:
        HostError: it ended, or didn't mount in time.
    """
    with log.open("ab") as file:
        process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            env=os.environ | environment, start_new_session=True,
        )  # fmt: skip
    try:
        wait_until(
            lambda: is_mounted(mounted) or process.poll() is not None, f"{command[0]} mounts", MOUNT_TIMEOUT_S
        )
        if process.poll() is not None:
            said = log.read_text(errors="replace")[-2000:]
            raise HostError(f"{command[0]} ended with {process.returncode}:\n{said}")
        yield
    finally:
        force_unmount(mounted)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait(30)


@contextlib.contextmanager
def bare(directory: Path, flat: Path, rewriting: Rewriting) -> Iterator[Path]:
    with bare_passthrough(flat, directory / "mount") as file:
        yield file


@contextlib.contextmanager
def _storage_daemon(directory: Path, *blockdev: str) -> Iterator[Path]:
    served = directory / "served"
    served.touch()
    export = f"type=fuse,id=e,node-name=n,mountpoint={served},writable=off"
    command = ["qemu-storage-daemon", "--blockdev", ",".join(["node-name=n", "read-only=on", *blockdev]),
               "--export", export]  # fmt: skip
    with serving(command, directory / "log", served):
        yield served


@contextlib.contextmanager
def raw_export(directory: Path, flat: Path, rewriting: Rewriting) -> Iterator[Path]:
    with _storage_daemon(directory, "driver=file", f"filename={flat}") as served:
        yield served


@contextlib.contextmanager
def chain_export(directory: Path, flat: Path, rewriting: Rewriting) -> Iterator[Path]:
    """The flat copy below as many layers, over which the same writes are spread in their order."""
    below, kind = flat, "raw"
    for number, offsets in enumerate(rewriting.parts(CHAIN_LAYERS)):
        layer = directory / f"{number}.qcow2"
        run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(below), "-F", kind, str(layer)])
        writes = "".join(f"write -q -P {number + 1} {offset} {WRITE_BYTES}\n" for offset in offsets.tolist())
        done = subprocess.run(["qemu-io", "-f", "qcow2", str(layer)], input=writes, text=True,
                              capture_output=True, check=False, timeout=BUILD_TIMEOUT_S)  # fmt: skip
        if done.returncode or "rror" in done.stdout + done.stderr:
            raise HostError(f"qemu-io {layer}: exit {done.returncode}\n{(done.stdout + done.stderr)[-1000:]}")
        below, kind = layer, "qcow2"
    with _storage_daemon(directory, "driver=qcow2", "file.driver=file", f"file.filename={below}") as served:
        yield served


@contextlib.contextmanager
def borg_mount(directory: Path, flat: Path, rewriting: Rewriting) -> Iterator[Path]:
    environment = {"BORG_BASE_DIR": str(directory), "BORG_PASSPHRASE": "bench"}
    repository, mounted = directory / "repository", directory / "mount"
    mounted.mkdir()
    # As its manual begins; restic can't do without. Reads without any are half as fast again.
    _build(["borg", "init", "--encryption", "repokey", repository], directory, environment)
    _build(["borg", "create", f"{repository}::{ARCHIVE}", flat.name], flat.parent, environment)
    command = ["borg", "mount", "--foreground", f"{repository}::{ARCHIVE}", mounted]
    with serving(command, directory / "log", mounted, environment):
        yield mounted / flat.name


@contextlib.contextmanager
def restic_mount(directory: Path, flat: Path, rewriting: Rewriting) -> Iterator[Path]:
    environment = {"RESTIC_PASSWORD": "bench", "RESTIC_CACHE_DIR": str(directory / "cache")}
    repository, mounted = directory / "repository", directory / "mount"
    mounted.mkdir()
    restic: list[str | Path] = ["restic", "--quiet", "--repo", repository]
    _build([*restic, "init"], directory, environment)
    _build([*restic, "backup", flat], directory, environment)
    with serving([*restic, "mount", mounted], directory / "log", mounted, environment):
        yield mounted / "snapshots" / "latest" / flat.relative_to("/")


def _build(command: Sequence[str | Path], directory: Path, environment: Mapping[str, str]) -> None:
    words = list(map(str, command))
    done = subprocess.run(words, cwd=directory, env=os.environ | environment, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, check=False, timeout=BUILD_TIMEOUT_S)  # fmt: skip
    if done.returncode:
        raise HostError(f"{' '.join(words)}: exit {done.returncode}\n{done.stderr[-1000:]}")


PEERS: Final = (
    Peer(BARE, (), "", bare),
    Peer(RAW, ("qemu-storage-daemon",), "qemu-system-common", raw_export),
    Peer(
        CHAIN, ("qemu-storage-daemon", "qemu-img", "qemu-io"), "qemu-system-common qemu-utils", chain_export
    ),
    Peer(BORG, ("borg",), "borgbackup python3-pyfuse3", borg_mount, slow=True),
    Peer(RESTIC, ("restic",), "restic", restic_mount, slow=True),
)
