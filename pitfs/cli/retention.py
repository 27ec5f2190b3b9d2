"""`pitfs retention`: shows or sets what a store keeps, and up to which age."""

from __future__ import annotations

import argparse
from collections import Counter, deque
from dataclasses import replace
from typing import Any, Final

from pitfs.cli.common.output import print_json, warn
from pitfs.cli.common.parser import add_json, add_store
from pitfs.errors import PitfsError, UsageError

DESCRIPTION: Final = (
    "Shows what a store keeps, or sets it. A new store keeps everything. A step is a granularity and the age up to "
    "which it holds, finest first: every-write, a rung (1ms, 5ms … 10s), snapshots (all of them), hourly, daily, "
    "weekly, monthly, yearly (the last snapshot of each, UTC). Behind the last step nothing is kept but bookmarks. "
    "Ages, as 5min or 14d (y, w, d, h, m or min, s), count from the newest state."
)
EXAMPLES: Final = """\
examples:
  pitfs retention /srv/pitfs/db1
  pitfs retention /srv/pitfs/db1 --set "every-write 3d, 1s 14d, snapshots 30d, hourly 90d, daily 2y"
  pitfs retention /srv/pitfs/db1 --max-size 2TB
  pitfs retention /srv/pitfs/db1 --set everything --max-size none"""
EVERYTHING: Final = "everything"
NONE: Final = "none"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    parser.add_argument("--set", metavar="STEPS", help=f"the steps, or '{EVERYTHING}'")
    parser.add_argument("--bookmarks", metavar="AGE", help=f"how long bookmarks are kept; '{NONE}': for ever")
    for option, where in (("--max-size", "the store takes more"), ("--min-free", "less is left on its file system")):
        parser.add_argument(option, metavar="SIZE", help=f"coarsen the oldest where {where}; or '{NONE}'")
    add_json(parser, "set, bookmarks_ns, max_size_bytes, min_free_bytes, words")


def run(args: argparse.Namespace) -> int:
    from pitfs.store.opening import read_store_info
    from pitfs.store.retention.levels import Policy, format_steps, in_words, parse_age, parse_steps
    from pitfs.store.retention.policy import load_policy, save_policy

    read_store_info(args.store)
    policy = load_policy(args.store) or Policy()
    changes = dict[str, Any]()
    for option, name, parse, word, meaning in (
        ("set", "steps", parse_steps, EVERYTHING, ()),
        ("bookmarks", "bookmarks_ns", parse_age, NONE, None),
        ("max-size", "max_size_bytes", _parse_size, NONE, None),
        ("min-free", "min_free_bytes", _parse_size, NONE, None),
    ):
        if (text := getattr(args, option.replace("-", "_"))) is not None:
            try:
                changes[name] = meaning if text == word else parse(text)
            except (UsageError, ValueError) as error:
                raise UsageError(f"--{option}: {error}") from None
    if changes:
        policy = replace(policy, **changes)
        save_policy(args.store, policy)
    words = in_words(policy)
    if args.json:
        numbers = {name: getattr(policy, name) for name in ("bookmarks_ns", "max_size_bytes", "min_free_bytes")}
        print_json({"set": format_steps(policy.steps) or EVERYTHING, **numbers, "words": words})
        return 0
    print(*words, sep="\n", flush=True)
    if changes:
        when = "within an hour, or a minute after pitfs receive starts; it asks nobody"
        print(f"The next pruning ({when}) {_goes(args.store)}: see pitfs prune {args.store} --dry-run.")
    return 0


def _goes(store: str) -> str:
    """What a pruning would do now."""
    from pitfs.cli.prune import losses, summed
    from pitfs.store.retention.plan import Retention

    sums = Counter[str]()
    try:
        with Retention(store, changes=False) as retention:
            deque(summed(retention, sums), 0)
            if retention.lacking_bytes:
                warn(retention.lack())
    except PitfsError as error:
        return f"applies it; what goes can't be told now ({error})"
    return losses(sums) or "takes nothing"


def _parse_size(text: str) -> int:
    from pitfs.config.quantities import parse_size

    size = parse_size(text)
    if size == 0:
        raise ValueError("0 keeps nothing: write none for no limit")
    return size
