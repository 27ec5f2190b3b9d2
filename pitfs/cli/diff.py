"""`pitfs diff`: the byte ranges of a volume that differ between two instants.

The bitmap that --bitmap writes has a bit for each block of the volume, set where it differs: that of block b is bit
b % 8 (value 1 << b % 8) of byte b // 8. It has ceil(blocks / 8) bytes, no header, and holes where nothing differs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

import msgspec

from pitfs.cli.progress import progress
from pitfs.cli.resolve import TIME_HELP, resolve, volume_index
from pitfs.errors import CapacityError, PitfsError, UsageError
from pitfs.model.position import format_instant
from pitfs.storage.files import FULL_ERRNOS, write_all

if TYPE_CHECKING:
    from pitfs.view.differences import Difference, DifferingLeaf

NAME: Final = "diff"
Ranges = Iterable[tuple[int, int]]


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        NAME,
        help="what differs between two instants of a volume",
        description="Prints the byte ranges of a volume that differ between two instants, either of which may be the "
        "earlier one: a line with offset and size for each, ascending, whole blocks. Takes as long as there are "
        "differences, however large the volume and however much history lies between. What was overwritten with the "
        "same content doesn't differ.",
        epilog="""\
examples:
  pitfs diff /srv/replica/db1 1h-ago latest root
  pitfs diff /srv/replica/db1 before-upgrade latest root --json
  pitfs diff /srv/replica/db1 1h-ago latest root --bitmap /var/tmp/root.bits""",
    )
    parser.add_argument("store", metavar="STORE", help="directory of the store")
    parser.add_argument("from_time", metavar="TIME1", help=TIME_HELP)
    parser.add_argument("to_time", metavar="TIME2", help="as TIME1")
    parser.add_argument("volume", metavar="VOLUME", help="name of the volume")
    parser.add_argument("--tz", metavar="ZONE", default="UTC", help="zone of times without one (default UTC)")
    parser.add_argument(
        "--json", action="store_true", help="from, to, volume, block_size, size_bytes, ranges, changed_bytes"
    )
    parser.add_argument(
        "--bitmap",
        metavar="FILE",
        help="write a bit for each block to a new FILE instead of lines: that of block b is bit b %% 8, counted from "
        "the least significant, of byte b // 8",
    )


def run(args: argparse.Namespace) -> int:
    from pitfs.cli.holding import open_held
    from pitfs.view.differences import Difference

    with open_held(args.store, f"diff of {args.volume}") as (store, holder):
        one, other = (
            holder.pinned(store, resolve(store, time, args.tz)[0]) for time in (args.from_time, args.to_time)
        )
        difference = Difference(store, one, other, volume_index(store, args.volume))
        names = {"from": format_instant(one.time_ns), "to": format_instant(other.time_ns)}
        facts = names | {
            "from_seq": one.seq,
            "to_seq": other.seq,
            "volume": args.volume,
            "block_size": difference.block_size,
            "size_bytes": difference.size_bytes,
        }
        with contextlib.ExitStack() as stack:
            leaves = difference.leaves()
            if args.bitmap:
                leaves = stack.enter_context(_bitmap(args.bitmap, difference, leaves))
            ranges = difference.ranges(leaves)
            if not sys.stdout.isatty():
                advance = stack.enter_context(progress(f"diff of {args.volume}", difference.size_bytes))
                ranges = _followed(ranges, advance)
            if args.json:
                count, changed_bytes = _write_json(facts, ranges)
            else:
                count, changed_bytes = _write_text(ranges, silent=bool(args.bitmap))
    print(
        f"{args.volume}: {changed_bytes} of {difference.size_bytes} bytes differ, in {count} "
        f"range{'s' if count != 1 else ''}, between {names['from']} and {names['to']}",
        file=sys.stderr,
    )
    return 0


def _followed(ranges: Ranges, advance: Callable[[int], None]) -> Iterator[tuple[int, int]]:
    position = 0
    for start, end in ranges:
        advance(end - position)
        position = end
        yield start, end


def _write_text(ranges: Ranges, silent: bool) -> tuple[int, int]:
    """Returns how many ranges there are and their bytes."""
    count = changed_bytes = 0
    if sys.stdout.isatty() and not silent:
        print("offset size")
    for start, end in ranges:
        count += 1
        changed_bytes += end - start
        if not silent:
            sys.stdout.write(f"{start} {end - start}\n")
    return count, changed_bytes


def _write_json(facts: dict[str, Any], ranges: Ranges) -> tuple[int, int]:
    """One document, written range by range. Returns as `_write_text`."""
    count = changed_bytes = 0
    write = sys.stdout.write
    write(msgspec.json.encode(facts).decode().removesuffix("}") + ',\n "ranges": [')
    for start, end in ranges:
        write(f'{"," if count else ""}\n  {{"offset": {start}, "size": {end - start}}}')
        count += 1
        changed_bytes += end - start
    write(f'],\n "changed_bytes": {changed_bytes}}}\n')
    return count, changed_bytes


@contextlib.contextmanager
def _bitmap(path: str, difference: Difference, leaves: Iterable[DifferingLeaf]) -> Iterator[Iterator[DifferingLeaf]]:
    """Gives the leaves on; their bits are in a new file when the block ends, which isn't there if it fails."""
    from pitfs.view.differences import bitmap

    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise UsageError(f"{path}: exists: give another name, or remove it") from None
    size = -(-difference.size_bytes // (8 * difference.block_size))

    def written() -> Iterator[DifferingLeaf]:
        for leaf in leaves:
            at = leaf.first // 8
            with _named(path):
                write_all(fd, bitmap(leaf)[: size - at], at)
            yield leaf

    try:
        with _named(path):
            os.ftruncate(fd, size)
        yield written()
        with _named(path):
            os.fsync(fd)
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(fd)


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """Says which file it is that the disk refuses."""
    try:
        yield
    except OSError as error:
        kind = CapacityError if error.errno in FULL_ERRNOS else PitfsError
        raise kind(f"{path}: writing: {os.strerror(error.errno or 0)}: write it to another place") from error
