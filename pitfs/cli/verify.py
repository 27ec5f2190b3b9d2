"""`pitfs verify`: compares volumes with the digests that production took of them."""

from __future__ import annotations

import argparse
from typing import Any, Final

from pitfs.cli.common.output import print_json, state_row
from pitfs.cli.common.parser import add_json, add_store, add_time, add_volume

DESCRIPTION: Final = (
    "Reads the newest snapshot not after TIME of which production sent a digest, and compares. Exit status 0 only if "
    "every volume is equal."
)
EXAMPLES: Final = """\
examples:
  pitfs verify /srv/pitfs/db1 latest
  pitfs verify /srv/pitfs/db1 2026-11-22T23:54:00Z root --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    add_time(parser)
    add_volume(parser, "?")
    results = "equal, differs, unreadable, no digest"
    add_json(parser, f"volumes [volume, result ({results}), problem, instant, seq, before_s]")


def run(args: argparse.Namespace) -> int:
    from pitfs.cli.common.pins import open_pinned, pin
    from pitfs.cli.common.progress import progress
    from pitfs.cli.common.times import volume_index
    from pitfs.model.units import format_seconds
    from pitfs.restore.verify import verify_volume

    rows = []
    with open_pinned(args.store, "verify") as (store, pins):
        time_ns = pin(store, pins, args.time, args.tz).time_ns
        one = args.volume is not None
        for volume in [volume_index(store, args.volume)] if one else range(len(store.volumes)):
            verified = verify_volume(store, pins, volume, time_ns, progress)
            snapshot, problem = verified.snapshot, verified.problem
            row: dict[str, Any] = {"volume": verified.volume, "problem": problem or None}
            if snapshot is None:
                row["result"], line = "no digest", f"no digest: {problem}"
            else:
                before_s = (time_ns - snapshot.time_ns) / 1e9
                result = "unreadable" if verified.is_unreadable else "differs" if problem else "equal"
                row |= {"result": result, "before_s": before_s, **state_row(snapshot)}
                line = f"{result.upper() if problem else result} at {row['instant']}"
                line += f", {format_seconds(before_s)} before the time that was given" if before_s else ""
                line += f": {problem}" if problem else ""
            rows.append(row)
            if not args.json:
                print(f"{verified.volume}: {line}", flush=True)
    if args.json:
        print_json({"volumes": rows})
    return 0 if all(row["result"] == "equal" for row in rows) else 1
