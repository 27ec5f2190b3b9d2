"""The minder of a group's two processes: starts the splitter and the shipper, and keeps them running."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Final

import trio

from pitfs.errors import EXIT_FAILED
from pitfs.supervision.service import cancel_on_signal, notify_ready

log = logging.getLogger(__name__)

RESTART_S: Final = 1.0
STEADY_S: Final = 60.0  # a part that ran this long gets the short pause again
MAX_RESTART_S: Final = 30.0
STOP_S: Final = 60.0  # for the splitter to sync and unmount


@dataclass(frozen=True, slots=True)
class Part:
    """One of the two processes: `python -m MODULE CONFIG`."""

    name: str
    module: str
    end_level: int  # of the log line about its end


SPLITTER: Final = Part("splitter", "pitfs.supervision.splitter_process", logging.ERROR)
SHIPPER: Final = Part("shipper", "pitfs.supervision.shipper_process", logging.WARNING)


class Minder:
    """Starts a part again when it dies. If the splitter fails to start at all, everything ends."""

    def __init__(self, config_path: str, verbose: int) -> None:
        self._arguments = [config_path, *(["-v"] if verbose else [])]
        self._processes: dict[Part, trio.Process] = {}

    async def run(self) -> int:
        """Runs until a signal; returns the exit code."""
        exit_code = 0
        async with trio.open_nursery() as nursery:
            await nursery.start(cancel_on_signal, nursery.cancel_scope)
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
