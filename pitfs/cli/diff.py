"""`pitfs diff`: the byte ranges of a volume that differ between two instants.

The bitmap that --bitmap writes has a bit for each block of the volume, set where it differs: that of block b is bit
b % 8 (value 1 << b % 8) of byte b // 8. It has ceil(blocks / 8) bytes, no header, and holes where nothing differs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from pitfs.cli.common.output import write_json
from pitfs.cli.common.parser import TIME_HELP, add_json, add_store, add_volume, add_zone
from pitfs.errors import UsageError
from pitfs.model.position import format_instant
from pitfs.storage.files import disk_errors, write_all

if TYPE_CHECKING:
    from pitfs.view.differences import Difference, DifferingLeaf

    Leaves = Iterator[DifferingLeaf]

DESCRIPTION: Final = (
    "Prints the byte ranges of a volume that differ between two instants, either of which may be the "
    "earlier one: a line with offset and size for each, ascending, whole blocks. The time it takes depends on "
    "how much differs, not on the size of the volume or the history between. What was overwritten with the "
    "same content doesn't differ."
)
EXAMPLES: Final = """\
examples:
  pitfs diff /srv/pitfs/db1 1h-ago latest root
  pitfs diff /srv/pitfs/db1 before-upgrade latest root --json
  pitfs diff /srv/pitfs/db1 1h-ago latest root --bitmap /var/tmp/root.bits"""

ADVICE: Final = "write it to another place"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    parser.add_argument("from_time", metavar="TIME1", help=TIME_HELP)
    parser.add_argument("to_time", metavar="TIME2", help="as TIME1")
    add_volume(parser)
    add_zone(parser)
    add_json(parser, "from, to, volume, block_size, size_bytes, ranges, changed_bytes")
    parser.add_argument(
        "--bitmap",
        metavar="FILE",
        help="write a bit for each block to a new FILE instead of lines: that of block b is bit b %% 8, counted from "
        "the least significant, of byte b // 8",
    )


def run(args: argparse.Namespace) -> int:
    from pitfs.cli.common.pins import open_pinned, pin
    from pitfs.cli.common.progress import progress
    from pitfs.cli.common.times import volume_index
    from pitfs.view.differences import Difference

    with open_pinned(args.store, f"diff of {args.volume}") as (store, pins), contextlib.ExitStack() as stack:
        one, other = (pin(store, pins, time, args.tz) for time in (args.from_time, args.to_time))
        difference = Difference(store, one, other, volume_index(store, args.volume))
        start, end = format_instant(one.time_ns), format_instant(other.time_ns)
        leaves = difference.leaves()
        if args.bitmap:
            leaves = stack.enter_context(_bitmap(args.bitmap, difference, leaves))
        reached: Callable[[int], None] = lambda done_bytes: None  # noqa: E731 — the lines show how far it is
        if not sys.stdout.isatty():
            reached = stack.enter_context(progress(f"diff of {args.volume}", difference.size_bytes))
        count = changed_bytes = 0

        def counted() -> Iterator[tuple[int, int]]:
            nonlocal count, changed_bytes
            for first, last in difference.ranges(leaves):
                reached(last)
                count += 1
                changed_bytes += last - first
                yield first, last

        def document() -> Iterator[tuple[str, Any]]:
            yield from (("from", start), ("to", end), ("from_seq", one.seq), ("to_seq", other.seq))
            yield from (("volume", args.volume), ("block_size", difference.block_size))
            yield "size_bytes", difference.size_bytes
            yield "ranges", ({"offset": first, "size": last - first} for first, last in counted())
            yield "changed_bytes", changed_bytes

        if args.json:
            write_json(document())
        elif args.bitmap:
            for _ in counted():
                pass
        else:
            if sys.stdout.isatty():
                print("offset size")
            sys.stdout.writelines(f"{first} {last - first}\n" for first, last in counted())
    print(
        f"{args.volume}: {changed_bytes} of {difference.size_bytes} bytes differ, in {count} "
        f"range{'s' if count != 1 else ''}, between {start} and {end}",
        file=sys.stderr,
    )
    return 0


@contextlib.contextmanager
def _bitmap(path: str, difference: Difference, leaves: Leaves) -> Iterator[Leaves]:
    """Passes the leaves on and writes their bits to a new file. If the block fails, the file is removed."""
    from pitfs.view.differences import bitmap

    with disk_errors(path, ADVICE):
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            raise UsageError(f"{path}: exists: give another name, or remove it") from None
    size = -(-difference.size_bytes // (8 * difference.block_size))

    def written() -> Leaves:
        for leaf in leaves:
            offset = leaf.first // 8
            with disk_errors(path, ADVICE):
                write_all(fd, bitmap(leaf)[: size - offset], offset)
            yield leaf

    try:
        with disk_errors(path, ADVICE):
            os.ftruncate(fd, size)
        yield written()
        with disk_errors(path, ADVICE):
            os.fsync(fd)
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(fd)
