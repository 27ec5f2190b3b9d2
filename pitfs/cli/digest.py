"""`pitfs digest`: xxh3_128 of a whole image, as `xxhsum -H2` prints it for a copy."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from xxhash import xxh3_128

from pitfs.cli.resolve import add_store_and_time, print_json, resolve, volume_index
from pitfs.model.position import format_instant

if TYPE_CHECKING:
    from pitfs.view.view import PointInTimeView

NAME: Final = "digest"
READ_BYTES: Final = 1 << 20  # read, verified and hashed while it is in the processor's cache


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        NAME,
        help="checksum of a volume at an instant",
        description="Prints the xxh3_128 of a volume's whole image, as `xxhsum -H2` does for a copy of it.",
        epilog="""\
examples:
  pitfs digest /srv/replica/db1 latest root
  pitfs digest /srv/replica/db1 2026-11-22T23:54:00Z root --json""",
    )
    add_store_and_time(parser)
    parser.add_argument("volume", metavar="VOLUME", help="name of the volume")
    parser.add_argument("--json", action="store_true", help="digest, instant, seq, volume, size_bytes")


def run(args: argparse.Namespace) -> int:
    from pitfs.cli.holding import open_held
    from pitfs.cli.progress import progress
    from pitfs.view.view import PointInTimeView

    with open_held(args.store, f"digest of {args.volume}") as (store, holder):
        resolution = holder.pinned(store, resolve(store, args.time, args.tz)[0])
        view = PointInTimeView(store, resolution, volume_index(store, args.volume))
        with progress(f"digest of {args.volume}", view.size_bytes) as advance:
            found = image_digest(view, advance)
    if args.json:
        print_json(
            {
                "digest": found,
                "algorithm": "xxh3_128",
                "instant": format_instant(resolution.time_ns),
                "seq": resolution.seq,
                "volume": args.volume,
                "size_bytes": view.size_bytes,
            }
        )
    else:
        print(found)
    return 0


def image_digest(view: PointInTimeView, advance: Callable[[int], None]) -> str:
    """xxh3_128 of the whole image in hex; every block is verified on the way."""
    from pitfs.view.view import ReadBuffer

    buffer = ReadBuffer(READ_BYTES)
    state = xxh3_128()
    for offset in range(0, view.size_bytes, READ_BYTES):
        data = view.read(offset, READ_BYTES, buffer)
        state.update(data)
        advance(len(data))
    return state.hexdigest()
