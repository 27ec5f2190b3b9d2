"""`pitfs export`: writes an image to a file or block device, or what differs from an earlier export."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Final

from pitfs.cli.common.parser import add_image
from pitfs.model.position import format_instant

DESCRIPTION: Final = (
    "Writes a volume's image to FILE: a regular file (sparse; complete or not there) "
    "or a block device at least as large. Every block is verified against its checksum on the way."
)
EXAMPLES: Final = """\
examples:
  pitfs export /srv/pitfs/db1 latest root /srv/restore/root.img
  pitfs export /srv/pitfs/db1 5m-ago root /dev/vg0/root --verify
  pitfs export /srv/pitfs/db1 latest root /srv/restore/root.img --from 2026-11-22T23-54-00.123456789Z"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_image(parser)
    parser.add_argument("file", metavar="FILE", help="file to make, or block device to overwrite")
    parser.add_argument("--verify", action="store_true", help="read FILE again and compare its digest")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--force", action="store_true", help="replace FILE if it exists")
    existing.add_argument(
        "--from", dest="from_time", metavar="TIME1",
        help="FILE holds the image at TIME1, an earlier or later one: write only what differs. What is there is "
        "checked first; with --verify the whole of FILE is compared afterwards. If it is interrupted, FILE is no "
        "image until the same command has been run again",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from pitfs.cli.common.pins import open_pinned, pin
    from pitfs.cli.common.progress import progress
    from pitfs.cli.common.times import volume_index
    from pitfs.restore.export import export
    from pitfs.restore.incremental_export import incremental_export
    from pitfs.view.view import PointInTimeView

    path, verify = args.file, args.verify
    with open_pinned(args.store, f"export {os.path.realpath(path)}") as (store, pins):
        state = pin(store, pins, args.time, args.tz)
        volume = volume_index(store, args.volume)
        done = f"{store.volumes[volume].size_bytes} bytes"
        if args.from_time is None:
            view = PointInTimeView(store, state, volume)
            export(view, path, replace=args.force, verify=verify, progress=progress)
        else:
            base = pin(store, pins, args.from_time, args.tz)
            changed_bytes = incremental_export(store, base, state, volume, path, verify=verify, progress=progress)
            done = f"{changed_bytes} of {done} differed"
    verified = ", verified" if verify else ""
    print(f"{path}: {args.volume} at {format_instant(state.time_ns)}, {done}{verified}", file=sys.stderr)
    return 0
