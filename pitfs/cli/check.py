"""`pitfs check`: whether all that a store has is what was written."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any, Final

from pitfs.cli.common.output import print_json, warn
from pitfs.cli.common.parser import add_json, add_store
from pitfs.errors import EXIT_FAILED, PitfsError, UsageError
from pitfs.model.position import format_instant
from pitfs.model.units import format_bytes

if TYPE_CHECKING:
    from pitfs.store.check.check import Report
    from pitfs.store.check.suffering import Stretch
    from pitfs.store.objects.damage import Damage

DESCRIPTION: Final = (
    "Verifies a store, also while it is received into, read and pruned: its catalog, its objects, all block maps and "
    "indexes; with --data all contents, too. Lists what is damaged, and the instants that can't be read wholly "
    "because of it; all others are whole. Exit 1 if there is damage. If it is stopped, the next one goes on from there."
)
EXAMPLES: Final = """\
examples:
  pitfs check /srv/pitfs/db1
  pitfs check /srv/pitfs/db1 --data --rate 50MB/s
  pitfs check /srv/pitfs/db1 --heal
  pitfs check /srv/pitfs/db1 --rebuild"""

MAX_SHOWN: Final = 10  # stretches of a place; --json has all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    parser.add_argument("--data", action="store_true", help="reread and verify all contents")
    parser.add_argument("--rate", metavar="BYTES/s", help="read contents no faster, as 50MB/s; with --data")
    parser.add_argument(
        "--rebuild", action="store_true", help="make the catalog again first, from its log and the objects"
    )  # fmt: skip
    parser.add_argument("--heal", action="store_true", help="ask production for contents that are damaged or missing")
    add_json(parser, "objects, bytes, damaged [object, from, to, instants], healed")


def run(args: argparse.Namespace) -> int:
    from pitfs.cli.common.progress import progress
    from pitfs.config.quantities import parse_size
    from pitfs.store.check.check import at_rate, check, contents_bytes

    try:
        rate = parse_size(args.rate.removesuffix("/s")) if args.rate else None
    except ValueError as error:
        raise UsageError(f"--rate {error}") from None
    if rate is not None and (rate < 1 or not args.data):
        raise UsageError("--rate: at least 1 byte per second, and only with --data")
    if args.rebuild:
        _rebuild(args.store)

    def checked(has_data: bool) -> Report:
        with progress("check", contents_bytes(args.store) if has_data else 0) as reached:
            return check(args.store, has_data, at_rate(rate, reached))

    report, healed, failure, has_data = checked(args.data), 0, None, args.data
    while args.heal and report.damaged:
        from pitfs.store.check.heal import make_frames, wait_healed

        if make_frames(args.store):
            has_data = True
            report = checked(True)
        try:
            count = wait_healed(args.store)
        except PitfsError as error:
            failure = error
            break
        if not count:
            break
        healed += count
        report = checked(has_data)
    if args.json:
        rows = [_row(*each) for each in report.damaged]
        print_json({"objects": report.objects, "bytes": report.bytes, "damaged": rows, "healed": healed})
    else:
        _print(args.store, report, args.data)
        if args.heal:
            print(f"healed: {healed}")
    if failure is not None:
        raise failure
    return EXIT_FAILED if report.damaged else 0


def _rebuild(store: str) -> None:
    from pitfs.store.check.rebuild import rebuild

    made = rebuild(store, warn, lambda snapshot_id: None)
    counts = f"{made.snapshots} snapshots, {made.intervals} intervals, {made.bookmarks} bookmarks, {made.gaps} gaps"
    kept = f"; the one before is {made.old}" if made.old else ""
    print(f"{store}: the catalog was made again: {counts}{kept}", file=sys.stderr)


def _row(damage: Damage, stretches: list[Stretch]) -> dict[str, Any]:
    """from, to: bytes of the object; to is null where all of it can't be read."""
    instants = [{"from": format_instant(first), "to": format_instant(last)} for first, last in stretches]
    to = damage.offset + damage.size if damage.size and damage.kind != "header" else None
    return {"object": damage.object, "from": damage.offset, "to": to, "kind": damage.kind, "instants": instants}


def _print(store: str, report: Report, has_data: bool) -> None:
    from pitfs.store.objects.damage import MAX_PLACES

    contents = f"{format_bytes(report.bytes)} of contents" if has_data else "contents not read (--data reads them)"
    number = len(report.damaged)
    count = f"{number or 'no'}{' or more' * (number >= MAX_PLACES)} damaged place{'s' * (number != 1)}"
    print(f"{store}: {report.objects} objects, {contents}: {count}")
    for damage, stretches in report.damaged:
        row = _row(damage, stretches)
        place = "all of it" if row["to"] is None else f"bytes {row['from']} to {row['to']}"
        print(f"{row['object']}, {place}: {_PROBLEMS[damage.kind]}")
        for each in row["instants"][:MAX_SHOWN]:
            print(f"    can't be read: {each['from']}" + (f" to {each['to']}" if each["to"] != each["from"] else ""))
        if not stretches:
            print("    no instant that can be listed suffers")
        elif len(stretches) > MAX_SHOWN:
            print(f"    and {len(stretches) - MAX_SHOWN} stretches more: --json names them")
    if report.damaged:
        others = "all other instants are whole" if has_data else "what is damaged of the contents --data tells"
        advice = "--heal asks production for contents, --rebuild makes a catalog again, the rest must come from a copy"
        warn(f"{others}; {advice} of the store")


_PROBLEMS: Final = {
    "content": "contents that aren't what was written",
    "node": "a part of a block map",
    "index": "a part of a difference journal's index",
    "header": "the object's header",
    "missing": "missing",
    "catalog": "the catalog",
}
