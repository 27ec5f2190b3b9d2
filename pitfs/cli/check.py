"""`pitfs check`: whether all that a store has is what was written."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TextIO

from pitfs.cli.common.output import print_json, warn
from pitfs.cli.common.parser import add_json, add_store
from pitfs.errors import EXIT_FAILED, PitfsError, UsageError
from pitfs.model.position import format_instant
from pitfs.model.units import counted, format_bytes

if TYPE_CHECKING:
    from pitfs.store.check.check import Report
    from pitfs.store.check.suffering import Stretch
    from pitfs.store.objects.damage import Damage

DESCRIPTION: Final = (
    "Verifies a store, also while it is received into, read and pruned: its catalog, its objects, all block maps and "
    "indexes; with --data all contents, too. Lists what is damaged, and the instants that can't be read wholly "
    "because of it; all others are whole. Exit 1 if there is damage. If it is stopped, the next one goes on from "
    "there. --heal has production send contents that are damaged or missing, and waits for them."
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
    parser.add_argument("--heal", action="store_true", help="--data, and damaged contents come back from production")
    parser.add_argument("--rate", metavar="BYTES/s", help="read contents no faster, as 50MB/s; with --data or --heal")
    rebuild_help = "make the catalog again from the objects, where it is lost, damaged or too old; while nobody writes"
    parser.add_argument("--rebuild", action="store_true", help=rebuild_help)
    add_json(parser, "objects, bytes, damaged [object, from, to, instants], healed")


def run(args: argparse.Namespace) -> int:
    from pitfs.cli.common.progress import progress
    from pitfs.config.quantities import parse_size
    from pitfs.store.check.check import check, contents_bytes
    from pitfs.store.check.heal import heal
    from pitfs.store.check.progress import at_rate
    from pitfs.store.objects.damage import DamageLog

    try:
        rate = parse_size(args.rate.removesuffix("/s")) if args.rate else None
    except ValueError as error:
        raise UsageError(f"--rate {error}") from None
    has_data, healed, failure = args.data or args.heal, 0, None
    if rate is not None and (rate < 1 or not has_data):
        raise UsageError("--rate: at least 1 byte per second, and only with --data or --heal")

    code = _rebuild(args.store, sys.stderr if args.json else sys.stdout) if args.rebuild else 0
    if args.rebuild and not (has_data or args.json):
        return code

    def checked() -> Report:
        with progress("check", contents_bytes(args.store) if has_data else 0) as reached:
            return check(args.store, has_data, at_rate(rate, reached))

    report = checked()
    try:
        while args.heal and report.damaged and (came := heal(args.store, partial(progress, "heal"))):
            healed, report = healed + came, checked()
    except PitfsError as error:  # said behind the report
        failure = error
    if report.problem:
        warn(report.problem)
    gone = args.heal and any(each.state == "gone" for each in DamageLog(args.store).known())
    if args.json:
        rows = [_row(args.store, report, *each) for each in report.damaged]
        print_json({"objects": report.objects, "bytes": report.bytes, "damaged": rows, "healed": healed})
    else:
        _print(args.store, report, has_data, healed, gone)
    if failure is not None:
        raise failure
    return EXIT_FAILED if report.damaged else code


def _rebuild(store: str, out: TextIO) -> int:
    from pitfs.store.check.rebuild import rebuild

    def reached(number: int) -> None:
        if sys.stderr.isatty() and number % 256 < 2:
            print(f"objects of id {number}", end="\r", file=sys.stderr)

    report = rebuild(store, warn, reached)
    names = "snapshot", "interval", "bookmark", "gap"
    has = ", ".join(counted(getattr(report, f"{name}s"), name) for name in names)
    lines = counted(report.missing, "line")
    problem = f"what is missing is said above ({lines})" if report.missing else "nothing is missing"
    print(f"{store}: {has}: {problem}", file=out)
    if report.old:
        advice = "restart mounts and servers of the store, which still read it"
        print(f"the catalog of before is {report.old}: {advice}", file=out)
    return EXIT_FAILED if report.missing else 0


def _row(store: str, report: Report, damage: Damage, stretches: list[Stretch]) -> dict[str, Any]:
    """from, to: bytes of the object; to is null where all of it can't be read. file, file_offset: where it is."""
    instants = [{"from": format_instant(first), "to": format_instant(last)} for first, last in stretches]
    to = damage.offset + damage.size if damage.size and damage.kind != "header" else None
    path, base = report.files.get(damage.object, (os.path.join(store, damage.object), 0))
    row = {"object": damage.object, "from": damage.offset, "to": to, "kind": damage.kind, "instants": instants}
    return row | {"file": os.path.relpath(path, store), "file_offset": base + damage.offset}


def _print(store: str, report: Report, has_data: bool, healed: int, is_gone: bool) -> None:
    contents = f"{format_bytes(report.bytes)} of contents" if has_data else "contents not read (--data reads them)"
    count = counted(len(report.damaged) or "no", "damaged place") + " or more" * (not report.has_all)
    found = count + (f"; healed before: {healed} contents or files" if healed else "")
    print(f"{store}: {report.objects} objects, {contents}: {found}")
    for damage, stretches in report.damaged:
        row = _row(store, report, damage, stretches)
        start = row["file_offset"]
        whole = "all of it" if start == row["from"] else f"from byte {start} on"
        place = whole if row["to"] is None else f"bytes {start} to {start + damage.size}"
        print(f"{row['file']}, {place}: {_PROBLEMS[damage.kind]}")
        for each in row["instants"][:MAX_SHOWN]:
            print(f"    can't be read: {each['from']}" + (f" to {each['to']}" if each["to"] != each["from"] else ""))
        if not stretches:
            print("    no instant that can be listed suffers")
        elif len(stretches) > MAX_SHOWN:
            print(f"    and {len(stretches) - MAX_SHOWN} stretches more: --json names them")
    if report.damaged:
        come = "contents come back by themselves, or by --heal, while production is connected"
        contents = "production has some contents no more" if is_gone else come
        remedies = {
            "contents": contents,
            "catalog": "--rebuild makes the catalog again",
            "other": "block maps and indexes come back from a copy of the store only",
        }
        others = "all other instants are whole" if has_data else "what is damaged of the contents --data tells"
        kinds = {
            "catalog" if each.kind == "catalog"
            else "contents" if each.object.endswith(".blocks") and each.kind != "index" else "other"
            for each, _ in report.damaged
        }  # fmt: skip
        warn("; ".join([f"{others}: export what you need", *(remedies[kind] for kind in sorted(kinds))]))


_PROBLEMS: Final = {
    "content": "contents that aren't what was written",
    "node": "a part of a block map",
    "index": "a part of a difference journal's index",
    "header": "the object's header",
    "missing": "missing",
    "catalog": "the catalog",
}
