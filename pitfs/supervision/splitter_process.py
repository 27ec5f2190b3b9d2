"""The splitter's process, started and minded by `pitfs protect`: mount, write path, control socket.

Started as `python -m pitfs.supervision.splitter_process CONFIG`; prints `ready` when writes are accepted.
"""

from __future__ import annotations

import errno
import gc
import glob
import logging
import os
import signal
import sys
import time
from typing import Final

import pyfuse3
import trio

from pitfs.config.production import Config
from pitfs.errors import PitfsError, UsageError
from pitfs.fuse.kernel.io_flusher import set_io_flusher
from pitfs.fuse.kernel.mountinfo import clear_dead_mount, is_dead, mounted_at
from pitfs.fuse.splitter import SplitterOperations, Syncer
from pitfs.splitter import control, messages
from pitfs.splitter.service import SplitterService
from pitfs.splitter.startup import VolumeSpec, lock_state, open_splitter
from pitfs.splitter.sync_gate import SyncGate
from pitfs.supervision.processes import run_process, set_process_name, told_to_stop

log = logging.getLogger(__name__)

FILE_SYSTEM: Final = "pitfs-splitter"


def prepare_mountpoint(mountpoint: str, group: str) -> None:
    """Makes the mountpoint if missing and clears what a killed splitter of this group left there.

    Raises:
        UsageError: it is no directory, or something else is mounted on it.
    """
    source = f"{FILE_SYSTEM}:{group}"
    clear_dead_mount(mountpoint, f"fuse.{FILE_SYSTEM}", source)
    if is_dead(mountpoint):
        dead = mounted_at(mountpoint)
        what = f"a dead mount of {dead.source} is there" if dead else "lies on a mount whose program is gone"
        raise UsageError(f"{mountpoint}: mountpoint: {what}: clear it with 'umount -l {mountpoint}'")
    try:
        os.makedirs(mountpoint, exist_ok=True)
    except FileExistsError:
        raise UsageError(
            f"{mountpoint}: mountpoint: not a directory: give one, or a path to make one at"
        ) from None
    except OSError as error:
        raise UsageError(
            f"{mountpoint}: mountpoint: can't be made: {os.strerror(error.errno or 0)}"
        ) from error
    present = mounted_at(mountpoint)
    if present is not None:
        raise UsageError(
            f"{mountpoint}: mountpoint: busy: {present.source} is mounted there: unmount it first (umount {mountpoint})"
        )


async def _serve(service: SplitterService, state: str, mountpoint: str) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(service.run)
        decode = messages.REQUESTS.decode
        await nursery.start(control.serve, state, control.SPLITTER_SOCKET, decode, service.handle)
        nursery.start_soon(_stop_when_told, service, mountpoint)
        print("ready", flush=True)
        await pyfuse3.main()
        nursery.cancel_scope.cancel()


async def _stop_when_told(service: SplitterService, mountpoint: str) -> None:
    await told_to_stop()
    for device, file in attached_loops(mountpoint):
        log.warning(
            "%s: %s is still attached to it: its users get I/O errors from now on, and what they haven't synced is "
            "lost: next time unmount and detach it (losetup -d %s) before this ends",
            file,
            device,
            device,
        )
    service.stop()
    pyfuse3.terminate()


def attached_loops(mountpoint: str) -> list[tuple[str, str]]:
    """(device, file) of the loop devices over files below the mountpoint."""
    found = []
    for path in glob.glob("/sys/block/loop*/loop/backing_file"):
        try:
            with open(path, encoding="utf-8", errors="surrogateescape") as file:
                backing = file.read().rstrip("\n")
        except OSError:  # detached since it was listed
            continue
        if os.path.dirname(backing) == mountpoint:
            found.append((f"/dev/{path.split('/')[3]}", backing))
    return sorted(found)


def serve(config: Config) -> int:
    """Runs the splitter until SIGTERM; returns the exit code."""
    set_process_name("pitfs-splitter")
    set_io_flusher()
    mountpoint, state = config.splitter.mountpoint, config.group.state
    lock = lock_state(state)
    prepare_mountpoint(mountpoint, config.group.name)
    resolved = os.path.realpath(mountpoint)  # here: once it is mounted, nobody answers until the loop runs
    splitter = open_splitter(
        state,
        config.group.name,
        [VolumeSpec(volume.name, volume.backing, volume.block_size) for volume in config.volumes],
        config.journal.capacity_bytes,
        config.journal.on_full == "block",
        time.time_ns,
    )
    replication = config.replication
    copying = splitter.state.copy is not None
    agreement = SyncGate(replication.mode == "sync", replication.on_disconnect == "block", copying)
    service = SplitterService(splitter, agreement)
    operations = SplitterOperations(splitter, Syncer(splitter), service.wait_for_room, service.written)
    options = {f"fsname={FILE_SYSTEM}:{config.group.name}", f"subtype={FILE_SYSTEM}"}
    # A stop from here on waits until somebody can unmount in order; `stop_signals` lets it through.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        pyfuse3.init(operations, mountpoint, options)
    except (RuntimeError, OSError) as error:
        raise UsageError(
            f"{mountpoint}: can't be mounted: {error}: is /dev/fuse there, and are you root?"
        ) from error
    gc.collect()
    gc.freeze()  # what is there now stays: collections needn't look at it, in the middle of a write
    try:
        trio.run(_serve, service, state, resolved)
    finally:
        pyfuse3.close(unmount=True)
        try:
            splitter.close()
        except OSError as error:
            raise PitfsError(f"{state}: closing: {os.strerror(error.errno or errno.EIO)}") from error
        os.close(lock)
    return 0


if __name__ == "__main__":
    sys.exit(run_process(serve))
