"""`pitfs digest`: xxh3_128 of a whole image, as `xxhsum -H2` prints it for a copy."""

from __future__ import annotations

import argparse
from typing import Final

from pitfs.cli.common.output import print_json, state_row
from pitfs.cli.common.parser import add_image, add_json

DESCRIPTION: Final = "Prints the xxh3_128 of a volume's whole image, as `xxhsum -H2` does for a copy of it."
EXAMPLES: Final = """\
examples:
  pitfs digest /srv/pitfs/db1 latest root
  pitfs digest /srv/pitfs/db1 2026-11-22T23:54:00Z root --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_image(parser)
    add_json(parser, "digest, instant, seq, volume, size_bytes")


def run(args: argparse.Namespace) -> int:
    from pitfs.cli.common.pins import open_pinned, pin
    from pitfs.cli.common.progress import progress
    from pitfs.cli.common.times import volume_index
    from pitfs.restore.digest import image_digest
    from pitfs.view.view import PointInTimeView

    with open_pinned(args.store, f"digest of {args.volume}") as (store, pins):
        resolution = pin(store, pins, args.time, args.tz)
        view = PointInTimeView(store, resolution, volume_index(store, args.volume))
        digest = image_digest(view, progress, f"digest of {args.volume}")
    if args.json:
        of_image = {**state_row(resolution), "volume": args.volume, "size_bytes": view.size_bytes}
        print_json({"digest": digest, "algorithm": "xxh3_128", **of_image})
    else:
        print(digest)
    return 0
