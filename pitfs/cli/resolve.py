"""`pitfs resolve`: the canonical instant that a time leads to."""

from __future__ import annotations

import argparse
import contextlib
from typing import Final

from pitfs.cli.common.output import print_json, state_row
from pitfs.cli.common.parser import add_json, add_store, add_time
from pitfs.cli.common.times import resolve
from pitfs.errors import NoSuchInstantError

DESCRIPTION: Final = "Prints the canonical instant of the newest reachable state not after TIME."
EXAMPLES: Final = """\
examples:
  pitfs resolve /srv/pitfs/db1 5m-ago
  pitfs resolve /srv/pitfs/db1 "2026-11-22 23:54" --tz Europe/Vienna
  pitfs resolve /srv/pitfs/db1 before-upgrade --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    add_time(parser)
    parser.add_argument("--strict", action="store_true", help="fail unless the state at exactly TIME is available")
    add_json(parser, "instant, seq, kind, granularity_ns, exact")


def run(args: argparse.Namespace) -> int:
    from pitfs.store.store import Store

    with contextlib.closing(Store.open(args.store)) as store:
        resolution, exact = resolve(store, args.time, args.tz, warn=not args.strict)
    row = state_row(resolution)
    if args.strict and not exact:
        raise NoSuchInstantError(
            f"{args.store}: the state at exactly {args.time!r} can't be given; the newest before it is "
            f"{row['instant']}: use that, or leave --strict out"
        )
    if args.json:
        row |= {"kind": resolution.kind, "granularity_ns": resolution.granularity_ns, "exact": exact}
        print_json(row)
    else:
        print(row["instant"])
    return 0
