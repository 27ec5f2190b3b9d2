"""The minder of a group's two processes: starts the splitter and the shipper, and keeps them running."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Final

import trio

from pitfs.config.production import Config
from pitfs.errors import EXIT_FAILED
from pitfs.fuse.splitter import users_of
from pitfs.supervision.service import next_signal, notify, notify_ready, stop_signals

log = logging.getLogger(__name__)

RESTART_S: Final = 1.0
STEADY_S: Final = 60.0  # a part that ran this long gets the short pause again
MAX_RESTART_S: Final = 30.0
STOP_S: Final = 60.0  # for the splitter to sync and unmount
USERS_S: Final = 1.0  # how often a stop that waits looks who uses the volumes


@dataclass(frozen=True, slots=True)
class Part:
    """One of the two processes: `python -m MODULE CONFIG`."""

    name: str
    module: str
    end_level: int  # of the log line about its end


SPLITTER: Final = Part("splitter", "pitfs.supervision.splitter_process", logging.ERROR)
SHIPPER: Final = Part("shipper", "pitfs.supervision.shipper_process", logging.WARNING)


class Minder:
    """Starts a part again when it dies. If the splitter fails to start at all, everything ends.

    A signal ends both parts, but not while a volume is in use: the disk would go from under its users. Until they are
    gone both go on. A second signal ends them in any case.
    """

    def __init__(self, config: Config, verbose: int) -> None:
        self._arguments = [config.path, *(["-v"] if verbose else [])]
        self._mountpoint = os.path.realpath(config.splitter.mountpoint)  # before it is mounted
        self._volumes = [volume.name for volume in config.volumes]
        self._processes: dict[Part, trio.Process] = {}

    async def run(self) -> int:
        """Runs until a signal; returns the exit code."""
        exit_code = 0
        async with trio.open_nursery() as nursery:
            await nursery.start(self._stop_on_signal, nursery.cancel_scope)
            if await self._start(SPLITTER):
                nursery.start_soon(self._mind, SPLITTER)
                nursery.start_soon(self._mind, SHIPPER)
                notify_ready()
            else:
                code = await self._processes[SPLITTER].wait()
                exit_code = code if code > 0 else EXIT_FAILED
                if code <= 0:  # else it has printed the reason itself
                    log.error("the splitter ended (%s) before it was ready", _end_text(code))
                nursery.cancel_scope.cancel()
        # The shipper first: it asks the splitter. The splitter's end makes everything durable and unmounts.
        with trio.CancelScope(shield=True):
            await self._stop(SHIPPER)
            code = await self._stop(SPLITTER)
        return exit_code or code

    async def _stop_on_signal(self, scope: trio.CancelScope, *, task_status: trio.TaskStatus[None]) -> None:
        """Cancels the scope at a signal, once no volume is in use, or at the second one."""
        with stop_signals() as signals:
            task_status.started()
            log.info("%s: stopping", await next_signal(signals))
            notify("STOPPING=1")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._wait_until_unused, nursery.cancel_scope)
                log.warning("%s: the second signal: stopping in any case", await next_signal(signals))
                nursery.cancel_scope.cancel()
            scope.cancel()

    async def _wait_until_unused(self, scope: trio.CancelScope) -> None:
        """Cancels the scope when nobody uses a volume; says who does, each time that it changes."""
        said: list[str] = []
        while users := await trio.to_thread.run_sync(users_of, self._mountpoint, self._volumes):
            if users != said:
                for line in users:
                    log.warning("waiting, still in use: %s", line)
                log.warning("writes are served until that has ended; a second signal stops in any case")
                notify(f"STATUS=waiting, still in use: {users[0]}")
                said = users
            await trio.sleep(USERS_S)
        if said:
            log.info("no volume is in use any more: stopping")
        scope.cancel()

    async def _start(self, part: Part) -> bool:
        """Starts a part; returns whether it printed `ready`."""
        command = [sys.executable, "-m", part.module, *self._arguments]
        process = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._processes[part] = process
        assert process.stdout is not None
        return bool(await process.stdout.receive_some())  # it prints nothing else

    async def _mind(self, part: Part) -> None:
        pause = RESTART_S
        while True:
            begun = trio.current_time()
            if part not in self._processes and not await self._start(part):
                log.debug("%s didn't become ready", part.module)
            code = await self._processes[part].wait()
            del self._processes[part]
            pause = RESTART_S if trio.current_time() - begun > STEADY_S else min(2 * pause, MAX_RESTART_S)
            log.log(part.end_level, "the %s ended (%s): starting it again in %g s", part.name, _end_text(code), pause)
            await trio.sleep(pause)

    async def _stop(self, part: Part) -> int:
        """Ends a part in order, or kills it after `STOP_S`; returns the exit code for the whole."""
        process = self._processes.get(part)
        if process is None:
            return 0
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            if process.stdin is not None:
                await process.stdin.aclose()  # a part that is just starting has no handler yet, but sees this
        with trio.move_on_after(STOP_S):
            code = await process.wait()
            if code == -signal.SIGTERM:
                return 0  # it had not opened anything yet
            return code if code >= 0 else EXIT_FAILED
        log.error("the %s doesn't end within %g s: it is killed; nothing acknowledged is lost", part.name, STOP_S)
        process.kill()
        await process.wait()
        return EXIT_FAILED


def _end_text(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name
