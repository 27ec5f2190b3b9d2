"""`pitfs prune`: applies a store's retention policy, or says what it would do."""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from pitfs.cli.common.output import granularity_text, print_json, span_text, warn, write_json
from pitfs.cli.common.parser import add_json, add_store
from pitfs.cli.common.progress import progress
from pitfs.errors import UsageError
from pitfs.model.position import format_instant
from pitfs.model.units import counted, format_bytes
from pitfs.store.retention.levels import LEVELS, SNAPSHOTS

if TYPE_CHECKING:
    from pitfs.store.retention.plan import Retention

DESCRIPTION: Final = (
    "Applies the policy that pitfs retention has set. The newest snapshot, what is behind it, and what is pinned stay. "
    "pitfs receive does it by itself, a minute after its start and then each hour, and asks nobody. By hand --yes is "
    "needed where the policy keeps nothing but the newest snapshot and what bookmarks and pins keep, or where more "
    "than half of all snapshots would go to make room (--max-size, --min-free)."
)
EXAMPLES: Final = "examples:\n  pitfs prune /srv/pitfs/db1 --dry-run\n  pitfs prune /srv/pitfs/db1"
SUMS: Final = ("freed_bytes", "snapshots", "instants")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    parser.add_argument("--dry-run", action="store_true", help="say of each stretch of time what would go, and why")
    parser.add_argument("--yes", action="store_true", help="even if that takes most of what there is")
    add_json(parser, "freed_bytes, actions, skipped; with --dry-run stretches, freed_bytes, snapshots, instants")


def run(args: argparse.Namespace) -> int:
    from pitfs.store.retention.plan import Retention

    with Retention(args.store, changes=not args.dry_run) as retention:
        if retention.lacking_bytes:
            warn(retention.lack())
        if args.dry_run:
            _foretell(retention, args.json)
            return 0
        if not args.yes and (what := retention.drastic()):
            raise UsageError(f"{args.store}: {what}: look at --dry-run, then give --yes")
        with progress("pruning", None) as show:
            done = retention.apply(lambda each: show(each.freed_bytes))
    if args.json:
        print_json({"freed_bytes": done.freed_bytes, "actions": done.done, "skipped": done.skipped})
    else:
        print(f"freed {format_bytes(done.freed_bytes)}" if done.done else "there was nothing to prune")
    return 0


def _foretell(retention: Retention, as_json: bool) -> None:
    sums = Counter[str]()
    found = summed(retention, sums)
    if as_json:
        members: list[tuple[str, Any]] = [("stretches", found)]
        write_json(itertools.chain(members, ((key, sums[key]) for key in SUMS)))
        return
    for row in found:
        line = f"{span_text(row)}  {granularity_text(row['granularity_now_ns'])} -> {row['then']}  ({row['reason']})"
        print("  ".join(filter(None, (line, losses(row)))))
    print(losses(sums) or "there is nothing to prune")


def summed(retention: Retention, sums: Counter[str]) -> Iterator[dict[str, Any]]:
    """The rows of what is foretold; `sums` has the sums of SUMS when they have been taken."""
    for stretch in retention.foretold():
        row = {
            "from": format_instant(stretch.from_ns),
            "to": format_instant(stretch.to_ns),
            "granularity_now_ns": stretch.now_ns,
            "granularity_then_ns": stretch.then_ns,
            "then": granularity_text(stretch.then_ns) if stretch.level <= SNAPSHOTS else LEVELS[stretch.level],
            "reason": stretch.reason,
        } | (numbers := {key: getattr(stretch, key) for key in SUMS})
        sums.update(numbers)
        yield row


def losses(row: Mapping[str, int]) -> str:
    """What goes, in words; "" for nothing."""
    gone = [counted(row["snapshots"], "snapshot")] if row["snapshots"] else []
    gone += [f"at least {counted(row['instants'], 'instant')}"] if row["instants"] else []
    freed = f"frees {format_bytes(row['freed_bytes'])}" if row["freed_bytes"] else ""
    return ", ".join(filter(None, (freed, "loses " * bool(gone) + " and ".join(gone))))
