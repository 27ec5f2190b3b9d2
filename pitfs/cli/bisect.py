"""`pitfs bisect`: finds the write that broke something, as git bisect run finds a commit."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import signal
import time
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Final

from pitfs.cli.common.output import granularity_text, print_json, state_row, warn
from pitfs.cli.common.parser import (
    TIME_HELP,
    add_command,
    add_json,
    add_scratch_dir,
    add_store,
    add_volume,
    add_zone,
)
from pitfs.errors import PitfsError, UsageError
from pitfs.model.bisection import Bisection, Verdict
from pitfs.model.units import format_seconds

if TYPE_CHECKING:
    from pitfs.store.pins.pins import Pins
    from pitfs.store.store import Resolution, Store

CANNOT_TELL: Final = 125
NO_VERDICT: Final = 126  # from here on; 1 to 124: bad
VERDICTS: Final = {0: Verdict.GOOD, CANNOT_TELL: Verdict.UNKNOWN}
TESTS_PER_MOUNT: Final = 16  # what they write takes room until it is unmounted
STDERR: Final = 2
MAX_RANGES: Final = 8

DESCRIPTION: Final = (
    "Finds the write that broke something: runs COMMAND with the device of a scratch image of an instant between GOOD "
    "and BAD as last argument, and halves what is left by its exit code, as git bisect run does. 0: good; 125: can't "
    "tell, a neighbour is tried; 1 to 124: bad; any other ends the search. First it tries both ends. A million writes "
    "take 22 runs. What COMMAND prints goes to standard error; it has no input, and the environment variables "
    "PITFS_DEVICE and PITFS_INSTANT. Nothing of the store changes."
)
EXAMPLES: Final = """\
examples:
  pitfs bisect /srv/pitfs/db1 root --good 18:00 --bad latest -- e2fsck -p
  pitfs bisect /srv/pitfs/db1 root --good before-upgrade --bad 5m-ago -- /root/is-the-ledger-there

  #!/bin/sh -e
  # /root/is-the-ledger-there DEVICE
  trap 'umount /mnt' EXIT
  mount "$1" /mnt || exit 125
  test -s /mnt/ledger.csv"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    add_volume(parser)
    parser.add_argument("--good", metavar="TIME", required=True, help=f"an instant that is good: {TIME_HELP}")
    parser.add_argument("--bad", metavar="TIME", required=True, help="a later one that is bad, said as --good")
    add_zone(parser)
    add_scratch_dir(parser)
    add_json(parser, "volume, last_good, first_bad, exact, reason, changed, more_changed, tests")
    add_command(parser, "tells whether the device is good")


def run(args: argparse.Namespace) -> int:
    from pitfs.cli.common.pins import open_pinned, pin
    from pitfs.cli.common.times import volume_index
    from pitfs.fuse.attach.attachments import signals_interrupt

    if not args.words:
        raise UsageError("COMMAND is missing: pitfs bisect STORE VOLUME --good TIME --bad TIME -- COMMAND")
    with open_pinned(args.store, f"bisect of {args.volume}") as (store, pins), signals_interrupt():
        volume = volume_index(store, args.volume)
        good, bad = (pin(store, pins, time, args.tz) for time in (args.good, args.bad))
        if good.seq >= bad.seq:
            raise UsageError(
                f"--good {args.good} (seq {good.seq}) must be earlier than --bad {args.bad} (seq {bad.seq}); "
                "to find where something became good, let COMMAND exit with 0 where it is bad"
            )
        bisection, tests = _search(args, store, pins, good, bad)
        good, bad = store.at_seq(bisection.good), store.at_seq(bisection.bad)
        changed = _changed(store, good, bad, volume)
        reason = _reason(store, good, bad, len(bisection.unknown))
    found = {
        "volume": args.volume, "last_good": state_row(good), "first_bad": state_row(bad), "exact": not reason,
        "reason": reason or None, "changed": changed[:MAX_RANGES], "more_changed": len(changed) > MAX_RANGES,
        "tests": tests,
    }  # fmt: skip
    if args.json:
        print_json(found)
    else:
        _print(found, args.store)
    return 1 if bisection.unknown else 0


def _search(
    args: argparse.Namespace, store: Store, pins: Pins, good: Resolution, bad: Resolution
) -> tuple[Bisection, list[dict[str, Any]]]:
    """The end of the search between two states, which are tested first; and a row for each test.

    Raises:
        PitfsError: COMMAND says something else of these two, or can't be run.
    """
    from pitfs.fuse.attach.attachments import scratch_mount

    bisection = Bisection(good.seq, bad.seq, lambda seq: store.at_seq(seq).seq)
    ends = ((good, Verdict.GOOD, "an earlier"), (bad, Verdict.BAD, "another"))
    tests: list[dict[str, Any]] = []
    with contextlib.ExitStack() as mount:
        for seq in chain((good.seq, bad.seq), iter(bisection.next, None)):
            if len(tests) % TESTS_PER_MOUNT == 0:
                mount.close()
                mountpoint = mount.enter_context(scratch_mount(store.path, store.group, args.scratch_dir))
            row = state_row(pins.pinned(store, store.at_seq(seq)))
            begun_s = time.monotonic()
            code = _run(args, f"{mountpoint}/{row['instant']}/{args.volume}.img", row["instant"])
            verdict = VERDICTS.get(code, Verdict.BAD)
            if len(tests) >= len(ends):
                bisection.tell(seq, verdict)
            elif verdict is not (wanted := ends[len(tests)])[1]:
                name = wanted[1].value
                raise PitfsError(
                    f"--{name} {row['instant']}: COMMAND exits with {code} there: {verdict.value}: give {wanted[2]} "
                    f"--{name}, or see whether COMMAND is right"
                )
            row |= {"verdict": verdict.name.lower(), "seconds": round(time.monotonic() - begun_s, 3)}
            tests.append(row)
            left = bisection.bad - bisection.good - 1
            warn(
                f"{row['instant']} (seq {seq}): {verdict.value} (exit code {code}, {format_seconds(row['seconds'])}); "
                f"{left} writes left, at most {left.bit_length()} tests if COMMAND can tell"
            )
    return bisection, tests


def _run(args: argparse.Namespace, image: str, instant: str) -> int:
    """Runs COMMAND with a device over the image; its exit code, if that is a verdict."""
    from pitfs.fuse.attach.attachments import attach_image
    from pitfs.fuse.kernel.processes import run_group

    with contextlib.ExitStack() as undo:
        device, _ = attach_image(image, undo)
        code = run_group([*args.words, device], STDERR, PITFS_DEVICE=device, PITFS_INSTANT=instant)
    if not 0 <= code < NO_VERDICT:
        how = f"with {code}" if code >= 0 else f"by {signal.Signals(-code).name}"
        raise PitfsError(
            f"{args.words[0]} ended {how} at {instant}: that is no verdict: let it exit with 0 (good), 1 to 124 (bad) "
            f"or {CANNOT_TELL} (can't tell)"
        )
    return code


def _changed(store: Store, good: Resolution, bad: Resolution, volume: int) -> list[dict[str, int]]:
    """The first byte ranges that differ, at most one more than are shown."""
    from pitfs.view.differences import Difference

    difference = Difference(store, good, bad, volume)
    ranges = islice(difference.ranges(difference.leaves()), MAX_RANGES + 1)
    return [{"offset": start, "size": end - start} for start, end in ranges]


def _reason(store: Store, good: Resolution, bad: Resolution, unknown: int) -> str:
    """Why more than one write lies between the two, or may; "" where it is one."""
    for gap in store.gaps(good.time_ns, bad.time_ns):
        if gap.to_time_ns > good.time_ns:
            return f"a gap lies between ({gap.cause})"
    if unknown:
        return f"of {unknown} instants between COMMAND can't tell"
    if bad.seq - good.seq > 1:
        return f"{bad.seq - good.seq} writes lie between; the store has there: {granularity_text(bad.granularity_ns)}"
    return ""


def _print(found: dict[str, Any], store: str) -> None:
    good, bad, volume = found["last_good"], found["first_bad"], found["volume"]
    for name, state in (("last good", good), ("first bad", bad)):
        print(f"{name}  {state['instant']}  seq {state['seq']}")
    if found["reason"]:
        print(f"not one write: {found['reason']}")
    for each in found["changed"]:
        print(f"changed    {volume}: {each['size']} bytes at {each['offset']}")
    place = shlex.quote(store)
    if found["more_changed"]:
        print(f"and more   pitfs diff {place} {good['instant']} {bad['instant']} {volume}")
    for name, state in (("last good", good), ("first bad", bad)):
        print(f"to look into the {name}: pitfs attach {place} {state['instant']} {volume}")
