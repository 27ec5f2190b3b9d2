"""`pitfs protect`: starts the splitter's and the shipper's processes and minds them."""

from __future__ import annotations

import argparse
import logging
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final

from pitfs.config.production import Config, load_config
from pitfs.errors import EXIT_FAILED

if TYPE_CHECKING:
    import trio

log = logging.getLogger(__name__)

NAME: Final = "protect"
SPLITTER: Final = "pitfs.supervision.splitter_process"
SHIPPER: Final = "pitfs.supervision.shipper_process"
RESTART_S: Final = 1.0
STEADY_S: Final = 60.0  # a part that ran this long gets the short pause again
MAX_RESTART_S: Final = 30.0
STOP_S: Final = 60.0  # for the splitter to sync and unmount


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        NAME,
        help="serve the volumes of a configuration and replicate every write",
        description="Serves each volume of CONFIG as a writable file, journals every write and replicates it. "
        "Runs in the foreground, prints 'ready' when writes are accepted, ends in order on SIGTERM. Starting it "
        "again after any stop goes on where it was.",
        epilog="examples:\n  pitfs protect /etc/pitfs/db1.toml\n  systemctl start pitfs-protect@db1",
    )
    parser.add_argument("config", metavar="CONFIG", help="TOML file of the group")


def run(args: argparse.Namespace) -> int:
    import trio

    from pitfs.supervision.processes import link_context, set_process_name, set_up_daemon_logging

    config = load_config(args.config)
    link_context(config)  # what is wrong with the certificates is said before anything starts
    set_up_daemon_logging(args.verbose)
    set_process_name("pitfs-protect")
    return trio.run(_Minder(config, args.verbose).run)


class _Minder:
    """Keeps the parts running: a part that dies is started again, one that can't start at all ends the whole."""

    def __init__(self, config: Config, verbose: int) -> None:
        self._config = config
        self._verbose = verbose
        self._processes: dict[str, trio.Process] = {}
        self._stopping = False
        self._exit_code = 0

    async def run(self) -> int:
        import trio

        from pitfs.supervision.service import notify, notify_ready

        async with trio.open_nursery() as nursery:
            await nursery.start(self._stop_on_signal, nursery.cancel_scope)
            if not await self._start(SPLITTER):
                code = await self._processes[SPLITTER].wait()
                self._exit_code = code if code > 0 else EXIT_FAILED
                if code <= 0:  # else it said itself why
                    log.error("the splitter ended (%s) before it was ready", _how(code))
                nursery.cancel_scope.cancel()
            else:
                nursery.start_soon(self._mind, SPLITTER)
                nursery.start_soon(self._mind, SHIPPER)
                notify_ready()
        notify("STOPPING=1")
        # The shipper first: it asks the splitter. The splitter's end makes everything durable and unmounts.
        with trio.CancelScope(shield=True):
            for module in (SHIPPER, SPLITTER):
                code = await self._stop(module)
                if module == SPLITTER and self._exit_code == 0:
                    self._exit_code = code
        return self._exit_code

    async def _start(self, module: str) -> bool:
        """Starts a part; returns whether it said `ready`."""
        import trio

        command = [sys.executable, "-m", module, self._config.path]
        if self._verbose:
            command.append("-v")
        process = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._processes[module] = process
        assert process.stdout is not None
        line = b""
        while not line.endswith(b"\n"):
            data = await process.stdout.receive_some(64)
            if not data:
                return False
            line += data
        return True

    async def _mind(self, module: str) -> None:
        import trio

        pause = RESTART_S
        while True:
            begun = trio.current_time()
            process = self._processes.get(module)
            if process is None:
                if not await self._start(module):
                    log.debug("%s didn't become ready", module)
                process = self._processes[module]
            code = await process.wait()
            del self._processes[module]
            pause = RESTART_S if trio.current_time() - begun > STEADY_S else min(2 * pause, MAX_RESTART_S)
            level = logging.ERROR if module == SPLITTER else logging.WARNING
            log.log(level, "the %s ended (%s): starting it again in %g s", _part(module), _how(code), pause)
            await trio.sleep(pause)

    async def _stop(self, module: str) -> int:
        import trio

        process = self._processes.get(module)
        if process is None:
            return 0
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            if process.stdin is not None:
                await process.stdin.aclose()  # and this it hears also where it was only just starting
        with trio.move_on_after(STOP_S):
            code = await process.wait()
            if code == -signal.SIGTERM:
                return 0  # it hadn't got as far as having anything to close
            return code if code >= 0 else EXIT_FAILED
        log.error(
            "the %s doesn't end within %g s: it is killed; nothing acknowledged is lost",
            _part(module),
            STOP_S,
        )
        process.kill()
        await process.wait()
        return 1

    async def _stop_on_signal(self, scope: trio.CancelScope, *, task_status: trio.TaskStatus[None]) -> None:
        from pitfs.supervision.service import stop_signals

        with stop_signals() as signals:
            task_status.started()
            async for number in signals:
                log.info("%s: stopping", signal.Signals(number).name)
                scope.cancel()


def _part(module: str) -> str:
    return "splitter" if module == SPLITTER else "shipper"


def _how(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name
