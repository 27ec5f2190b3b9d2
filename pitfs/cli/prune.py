"""`pitfs prune`: applies a store's retention policy, or says what it would do."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from pitfs.cli.common.output import granularity_text, print_json, span_text, warn, write_json
from pitfs.cli.common.parser import add_json, add_store
from pitfs.cli.common.progress import progress
from pitfs.errors import UsageError
from pitfs.model.position import format_instant
from pitfs.model.retention import LEVELS, SNAPSHOTS
from pitfs.model.units import format_bytes

if TYPE_CHECKING:
    from pitfs.store.retention.plan import Retention
    from pitfs.store.retention.stretches import Stretch

DESCRIPTION: Final = (
    "Applies the policy that pitfs retention has set. The newest snapshot, what is behind it, and what is pinned stay. "
    "pitfs receive does it by itself each hour."
)
EXAMPLES: Final = "examples:\n  pitfs prune /srv/pitfs/db1 --dry-run\n  pitfs prune /srv/pitfs/db1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    parser.add_argument("--dry-run", action="store_true", help="say of each stretch of time what would go, and why")
    parser.add_argument("--yes", action="store_true", help="even if nothing but the newest snapshot is left")
    add_json(parser, "freed_bytes, actions, skipped; with --dry-run stretches, freed_bytes, snapshots, instants")


def run(args: argparse.Namespace) -> int:
    from pitfs.store.retention.plan import Retention

    with Retention(args.store, changes=not args.dry_run) as retention:
        if retention.lacking_bytes:
            warn(retention.lack())
        if args.dry_run:
            _foretell(retention, args.json)
            return 0
        if not args.yes and (newest := retention.leaves_only_newest()):
            text = f"nothing but the newest snapshot, {newest}, would be left"
            raise UsageError(f"{args.store}: {text}: look at --dry-run, then give --yes")
        with progress("pruning", None) as show:
            done = retention.apply(lambda each: show(each.freed_bytes))
    if args.json:
        print_json({"freed_bytes": done.freed_bytes, "actions": done.done, "skipped": done.skipped})
    else:
        print(f"freed {format_bytes(done.freed_bytes)}" if done.done else "there was nothing to prune")
    return 0


def _foretell(retention: Retention, as_json: bool) -> None:
    sums = dict.fromkeys(("freed_bytes", "snapshots", "instants"), 0)

    def counted() -> Iterator[dict[str, Any]]:
        for row in map(_row, retention.foretold()):
            for key in sums:
                sums[key] += row[key]
            yield row

    if as_json:
        members: list[tuple[str, Any]] = [("stretches", counted())]
        write_json(itertools.chain(members, ((key, sums[key]) for key in sums)))
        return
    for row in counted():
        now = granularity_text(row["granularity_now_ns"])
        line = f"{span_text(row)}  {now} -> {row['then']}  ({row['reason']})"
        print(f"{line}  {_losses(row)}" if any(row[key] for key in sums) else line)
    print(_losses(sums) if any(sums.values()) else "there is nothing to prune")


def _row(stretch: Stretch) -> dict[str, Any]:
    then = granularity_text(stretch.then_ns) if stretch.level <= SNAPSHOTS else LEVELS[stretch.level]
    return {
        "from": format_instant(stretch.from_ns),
        "to": format_instant(stretch.to_ns),
        "granularity_now_ns": stretch.now_ns,
        "granularity_then_ns": stretch.then_ns,
        "then": then,
        "reason": stretch.reason,
        "freed_bytes": stretch.freed_bytes,
        "snapshots": stretch.snapshots,
        "instants": stretch.instants,
    }


def _losses(row: dict[str, Any]) -> str:
    instants = f"{row['snapshots']} snapshots and at least {row['instants']} instants go"
    return f"frees {format_bytes(row['freed_bytes'])}: {instants}"
