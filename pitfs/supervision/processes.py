"""What the processes of `pitfs protect` share: their frame, their names, and that they end with the minder."""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Callable
from typing import Final

import trio

from pitfs.config.production import Config, load_config
from pitfs.errors import UsageError
from pitfs.link.transport.tls import LinkContext, client_context, require_loopback
from pitfs.splitter.startup import VolumeSpec
from pitfs.supervision.report import report
from pitfs.supervision.service import stop_signals

PR_SET_NAME: Final = 15
TRIM_S: Final = 10.0


def set_process_name(name: str) -> None:
    """The name that ps and top show, so that an administrator can tell the processes apart."""
    ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode()[:15], 0, 0, 0)


async def trim_heap() -> None:
    """Gives unused memory back to the system every `TRIM_S`, for ever."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    while malloc_trim is not None:
        await trio.sleep(TRIM_S)
        await trio.to_thread.run_sync(malloc_trim, 0)


async def wait_for_stop() -> None:
    """Returns when the minder says so, or is gone: a group must never have two splitters.

    Standard input is a pipe to which the minder never writes, so it becomes readable when the minder closes it or ends.
    (PR_SET_PDEATHSIG follows the thread that started a process, not the minder.) SIGTERM and SIGINT have no effect: a
    terminal sends them to all processes, but the minder alone knows whether the volumes are still in use.
    """
    with stop_signals():
        await trio.lowlevel.wait_readable(sys.stdin.fileno())


def set_up_daemon_logging(verbose: int) -> None:
    """One line per event on standard error; a service manager adds the time."""
    level = logging.DEBUG if verbose else logging.INFO
    logging.basicConfig(
        level=level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )


def link_context(config: Config) -> LinkContext | None:
    """TLS for the link. Raises UsageError for invalid files, and for a link without TLS beyond loopback."""
    tls = config.tls
    if tls.insecure:
        require_loopback(config.replication.host)
        return None
    assert tls.certificate and tls.key and tls.authority  # as a `TlsConfig` says
    return client_context(tls.certificate, tls.key, tls.authority)


def volume_specs(config: Config) -> list[VolumeSpec]:
    """The volumes as the splitter opens them, in the group's order."""
    return [VolumeSpec(volume.name, volume.backing, volume.block_size) for volume in config.volumes]


def run_process(serve: Callable[[Config], int]) -> int:
    """The frame of a process: `PROGRAM CONFIG [-v]`, errors as one line, the contract's exit codes."""
    verbose = "-v" in sys.argv[2:]
    try:
        if len(sys.argv) < 2:
            raise UsageError("CONFIG is missing; this process is started by 'pitfs protect'")
        set_up_daemon_logging(verbose)
        return serve(load_config(sys.argv[1]))
    except BaseException as error:
        return report(error, verbose=verbose)
