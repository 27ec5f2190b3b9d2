"""`pitfs drill`: proves that a random instant can be used, as a job of cron does."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any, Final

from pitfs.cli.common.output import print_json, state_row
from pitfs.cli.common.parser import TIME_HELP, add_json, add_scratch_command, add_store, add_zone
from pitfs.errors import NoSuchInstantError, UsageError
from pitfs.model.units import format_seconds

if TYPE_CHECKING:
    from pitfs.store.store import Resolution, Store

DRAWS: Final = 64  # for a time that no gap has; a history may consist of gaps
SHOWN_BYTES: Final = 64 << 10  # the end of what a check that fails has printed

DESCRIPTION: Final = (
    "Attaches each volume at a random instant as a scratch disk, replays the journals of the filesystems on it and "
    "runs their own checks, then throws it away: a line for each volume, and exit code 1 if one is not in order. "
    "What a check that fails has printed goes to standard error. Nothing of the store changes."
)
EXAMPLES: Final = """\
examples:
  pitfs drill /srv/pitfs/db1
  pitfs drill /srv/pitfs/db1 --volume root --at 5m-ago
  pitfs drill /srv/pitfs/db1 --volume data --timeout 1h -- /usr/local/bin/start-and-query
  30 4 * * *  root  pitfs drill /srv/pitfs/db1 >>/var/log/pitfs-drill     (/etc/cron.d/pitfs)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    parser.add_argument("--at", metavar="TIME", help=f"not at random, but then: {TIME_HELP}")
    add_zone(parser)
    parser.add_argument("--volume", metavar="VOLUME", help="only this one")
    parser.add_argument(
        "--timeout", metavar="DURATION", default="24h",
        help="of each check, such as 1h: one that takes longer is ended, and has failed (default 24h)",
    )  # fmt: skip
    add_json(parser, "a list: instant, seq, volume, filesystems, ok, problem, seconds")
    add_scratch_command(parser, "run this instead of the filesystem's check; 0 means that all is in order")


def run(args: argparse.Namespace) -> int:
    from pitfs.cli.attach import warn_of_little_room
    from pitfs.cli.common.pins import open_pinned
    from pitfs.cli.common.times import resolve, volume_index
    from pitfs.config.quantities import TIMEOUT
    from pitfs.fuse.attach.attachments import scratch_mount, signals_interrupt

    try:
        timeout_s = TIMEOUT.parse(args.timeout) / 1e9
    except ValueError as error:
        raise UsageError(f"--timeout {error}") from None
    rows: list[dict[str, Any]] = []
    with open_pinned(args.store, "drill") as (store, pins), signals_interrupt():
        chosen = store.volumes if args.volume is None else [store.volumes[volume_index(store, args.volume)]]
        state = resolve(store, args.at, args.tz)[0] if args.at else random_state(store, random.SystemRandom().randint)
        at = state_row(pins.pinned(store, state))
        with scratch_mount(store.path, store.group, args.scratch_dir) as mountpoint:
            warn_of_little_room(args.scratch_dir)
            for name in (volume.name for volume in chosen):
                begun_s = time.monotonic()
                with tempfile.TemporaryFile(dir="/var/tmp") as said:
                    kinds, problem = _check(mountpoint, at["instant"], name, args.words, said, timeout_s)
                    seconds = round(time.monotonic() - begun_s, 3)
                    row = {"volume": name, "filesystems": kinds, "ok": not problem, "problem": problem or None}
                    rows.append(at | row | {"seconds": seconds})
                    if not args.json:
                        result = f"FAILED: {problem}" if problem else "ok"
                        line = at["instant"], name, "+".join(kinds) or "-", result, format_seconds(seconds)
                        print("  ".join(line), flush=True)
                    if problem:
                        said.seek(max(said.seek(0, os.SEEK_END) - SHOWN_BYTES, 0))
                        sys.stderr.write(said.read().decode(errors="backslashreplace"))
    if args.json:
        print_json(rows)
    return 0 if all(row["ok"] for row in rows) else 1


def random_state(store: Store, randint: Callable[[int, int], int]) -> Resolution:
    """The state at a time that is drawn uniformly from all that can be reached, by a function like random.randint."""
    first = store.first()
    if first is None:
        raise NoSuchInstantError(f"{store.path}: nothing has arrived yet: wait for the first full sync")
    for _ in range(DRAWS):
        state, _ = store.at_time(randint(first.time_ns, store.protected_through_ns()))
        if not any(gap.from_time_ns == state.time_ns for gap in store.gaps(state.time_ns, state.time_ns + 1)):
            break
    return state


def _check(
    mountpoint: str, instant: str, volume: str, words: list[str], said: IO[bytes], timeout_s: float
) -> tuple[list[str], str]:
    """The filesystems on an image, and what isn't in order, or "". What the checks print goes to `said`."""
    from pitfs.fuse.attach.attachments import attach_image
    from pitfs.fuse.attach.filesystem_check import check_commands
    from pitfs.fuse.kernel.loop_devices import filesystems
    from pitfs.fuse.kernel.processes import run_group

    with contextlib.ExitStack() as undo:
        device, _ = attach_image(f"{mountpoint}/{instant}/{volume}.img", undo)
        found = filesystems(device)
        kinds = [kind for _, kind in found]
        commands = [command for path, kind in found for command in check_commands(kind, path)]
        if words:
            commands = [(words[0], [*words, device])]
        for name, command in commands:
            try:
                code = run_group(command, said, timeout_s, PITFS_DEVICE=device, PITFS_INSTANT=instant)
            except subprocess.TimeoutExpired:
                return kinds, f"{name} was ended after {format_seconds(timeout_s)} (--timeout)"
            if code:
                return kinds, f"{name} ended {f'with {code}' if code > 0 else f'by signal {-code}'}"
    return kinds, "" if commands else "no filesystem that pitfs has a check for: give a COMMAND behind --, or --volume"
