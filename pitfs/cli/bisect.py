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
from pitfs.cli.common.parser import TIME_HELP, add_json, add_scratch_command, add_store, add_volume, add_zone
from pitfs.errors import PitfsError, UsageError
from pitfs.model.units import counted, format_seconds
from pitfs.restore.bisection import Bisection, Verdict

if TYPE_CHECKING:
    from pitfs.store.pins.pins import Pins
    from pitfs.store.store import Resolution, Store

CANNOT_TELL: Final = 125
NO_VERDICT: Final = 126  # from here on; 1 to 124: bad
VERDICTS: Final = {0: Verdict.GOOD, CANNOT_TELL: Verdict.UNKNOWN}
TESTS_PER_MOUNT: Final = 16  # what they write takes room until it is unmounted
STDERR: Final = 2
MAX_RANGES: Final = 8  # of what the write changed

DESCRIPTION: Final = (
    "Finds the write that broke something: runs COMMAND with the device of a scratch image of an instant between GOOD "
    "and BAD as last argument, and halves what is left by its exit code, as git bisect run does. 0: good; 125: can't "
    "tell, others are tried; 1 to 124: bad; any other ends the search. First it tries both ends. A million writes "
    "take 22 tests. What COMMAND prints goes to standard error; it has no input, and the environment variables "
    "PITFS_DEVICE and PITFS_INSTANT. Nothing of the store changes."
)
EXAMPLES: Final = """\
examples:
  pitfs bisect /srv/pitfs/db1 root --good 18:00 --bad latest -- sh -c 'e2fsck -p "$0"; e2fsck -f -n "$0"'
  pitfs bisect /srv/pitfs/db1 root --good before-upgrade --bad 5m-ago -- /root/is-the-ledger-there"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    add_volume(parser)
    parser.add_argument("--good", metavar="TIME", required=True, help=f"an instant that is good: {TIME_HELP}")
    parser.add_argument("--bad", metavar="TIME", required=True, help="a later one that is bad, said as --good")
    add_zone(parser)
    add_json(parser, "volume, last_good, first_bad, exact, reason, changed, tests")
    add_scratch_command(parser, "tells whether the device is good")


def run(args: argparse.Namespace) -> int:
    from pitfs.cli.common.pins import open_pinned, pin
    from pitfs.cli.common.times import volume_index
    from pitfs.fuse.attach.attachments import signals_interrupt
    from pitfs.view.differences import Difference

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
        difference = Difference(store, good, bad, volume)
        changed = list(islice(difference.ranges(difference.leaves()), MAX_RANGES))
        reason = _reason(store, good, bad, bisection)
    if args.json:
        ranges = [{"offset": start, "size": end - start} for start, end in changed]
        found = {"volume": args.volume, "last_good": state_row(good), "first_bad": state_row(bad)}
        print_json(found | {"exact": not reason, "reason": reason or None, "changed": ranges, "tests": tests})
        return 1 if bisection.unknown else 0
    rows = {"last good": state_row(good), "first bad": state_row(bad)}
    for name, row in rows.items():
        print(f"{name}  {row['instant']}  seq {row['seq']}")
    if reason:
        print(f"not just one write: {reason}")
    for start, end in changed:
        print(f"changed    {end - start} bytes at {start}")
    if len(changed) == MAX_RANGES:
        print("changed    perhaps more: pitfs diff lists all")
    for name, row in rows.items():
        print(f"to look into the {name}: pitfs attach {shlex.quote(args.store)} {row['instant']} {args.volume}")
    return 1 if bisection.unknown else 0


def _search(
    args: argparse.Namespace, store: Store, pins: Pins, good: Resolution, bad: Resolution
) -> tuple[Bisection, list[dict[str, Any]]]:
    """The end of the search between two states, which are tested first; and a row for each test."""
    from pitfs.cli.attach import warn_of_little_room
    from pitfs.fuse.attach.attachments import scratch_mount

    bisection = Bisection(good.seq, bad.seq, lambda seq: store.at_seq(seq).seq)
    ends = {good.seq: (Verdict.GOOD, "an earlier"), bad.seq: (Verdict.BAD, "another")}
    tests: list[dict[str, Any]] = []
    with contextlib.ExitStack() as mount:
        for seq in chain(ends, iter(bisection.next, None)):
            if len(tests) % TESTS_PER_MOUNT == 0:
                mount.close()
                mountpoint = mount.enter_context(scratch_mount(store.path, store.group, args.scratch_dir))
                warn_of_little_room(args.scratch_dir)
            row = state_row(pins.pinned(store, store.at_seq(seq)))
            instant, begun_s = row["instant"], time.monotonic()
            code = _test(args.words, f"{mountpoint}/{instant}/{args.volume}.img", instant)
            verdict = VERDICTS.get(code, Verdict.BAD)
            if seq not in ends:
                bisection.tell(seq, verdict)
            elif verdict is not (end := ends[seq])[0]:
                option = f"--{end[0].value}"
                raise PitfsError(
                    f"{option} {instant}: COMMAND exits with {code} there: {verdict.value}: give {end[1]} {option}, or "
                    "see whether COMMAND is right"
                )
            row |= {"verdict": verdict.value, "exit_code": code, "seconds": round(time.monotonic() - begun_s, 3)}
            tests.append(row)
            left = bisection.bad - bisection.good - 1
            warn(
                f"{instant} (seq {seq}): {verdict.value} (exit code {code}, {format_seconds(row['seconds'])}); "
                f"{counted(left, 'write')} left, at most {counted(left.bit_length(), 'test')} if COMMAND can tell"
            )
    return bisection, tests


def _test(words: list[str], image: str, instant: str) -> int:
    """Runs COMMAND with a device over the image; its exit code, if that is a verdict."""
    from pitfs.fuse.attach.attachments import attach_image
    from pitfs.fuse.kernel.processes import run_group

    with contextlib.ExitStack() as undo:
        device, _ = attach_image(image, undo)
        code = run_group([*words, device], STDERR, PITFS_DEVICE=device, PITFS_INSTANT=instant)
    if 0 <= code < NO_VERDICT:
        return code
    how = f"with {code}" if code >= 0 else f"by {signal.Signals(-code).name}"
    raise PitfsError(
        f"{words[0]} ended {how} at {instant}: that is no verdict: let it exit with 0 (good), 1 to 124 (bad) or "
        f"{CANNOT_TELL} (can't tell)"
    )


def _reason(store: Store, good: Resolution, bad: Resolution, bisection: Bisection) -> str:
    """Why more than one write lies between the two, or may; "" where it is one."""
    for gap in store.gaps(good.time_ns + 1, bad.time_ns):
        return f"a gap lies between ({gap.cause})"
    if bisection.unknown:
        return f"of {len(bisection.unknown)} instants between COMMAND can't tell"
    if bad.seq - good.seq > 1:
        return f"{bad.seq - good.seq} writes lie between; the store has there: {granularity_text(bad.granularity_ns)}"
    return ""
