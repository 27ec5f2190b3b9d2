"""The splitter's process, started and minded by `pitfs protect`: mount, write path, control socket.

Started as `python -m pitfs.supervision.splitter_process CONFIG`; prints `ready` when writes are accepted.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import signal
import sys
import time

import pyfuse3
import trio

from pitfs.config.production import Config
from pitfs.errors import PitfsError
from pitfs.fuse.kernel.io_flusher import set_io_flusher
from pitfs.fuse.splitter import SplitterOperations, attached_loops, mount_splitter, prepare_mountpoint
from pitfs.splitter import control, messages
from pitfs.splitter.group_commit import GroupCommit
from pitfs.splitter.service import SplitterService
from pitfs.splitter.startup import lock_state, open_splitter
from pitfs.splitter.sync_gate import SyncGate
from pitfs.supervision.processes import run_process, set_process_name, volume_specs, wait_for_stop

log = logging.getLogger("pitfs.supervision.splitter_process")  # __name__ is __main__ here


async def _serve(service: SplitterService, state: str, mountpoint: str) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(service.run)
        decode = messages.REQUESTS.decode
        await nursery.start(control.serve, state, control.SPLITTER_SOCKET, decode, service.handle)
        nursery.start_soon(_stop_on_request, service, mountpoint)
        print("ready", flush=True)
        await pyfuse3.main()
        nursery.cancel_scope.cancel()


async def _stop_on_request(service: SplitterService, mountpoint: str) -> None:
    await wait_for_stop()
    for loop in attached_loops(mountpoint):
        log.warning(
            "%s: %s is still attached to it: its users get I/O errors from now on, and what they haven't synced is "
            "lost: next time unmount and detach it (losetup -d %s) before this ends",
            loop.backing, loop.device, loop.device,
        )  # fmt: skip
    service.stop()
    pyfuse3.terminate()


def serve(config: Config) -> int:
    """Runs the splitter until SIGTERM; returns the exit code."""
    set_process_name("pitfs-splitter")
    refused = set_io_flusher()  # before there are threads
    mountpoint, state = config.splitter.mountpoint, config.group.state
    lock = lock_state(state)
    prepare_mountpoint(mountpoint, config.group.name)
    resolved = os.path.realpath(mountpoint)  # before it is mounted: then nothing answers until the loop runs
    journal = config.journal
    splitter = open_splitter(
        state, config.group.name, volume_specs(config), journal.capacity_bytes, journal.on_full == "block", time.time_ns
    )
    replication = config.replication
    copying = splitter.state.copy is not None
    gate = SyncGate(replication.mode == "sync", replication.on_disconnect == "block", copying)
    service = SplitterService(splitter, gate)
    operations = SplitterOperations(splitter, GroupCommit(splitter), service)
    # A stop from here on waits until the mount can be unmounted in order; `wait_for_stop` unblocks it.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    mount_splitter(operations, mountpoint, config.group.name)
    if refused:  # not before: a start that fails says why, in one line
        log.info("%s", refused)
    gc.collect()
    gc.freeze()  # what exists now stays, so collections in the middle of a write need not look at it
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
