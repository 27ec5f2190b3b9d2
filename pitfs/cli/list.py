"""`pitfs list`: snapshots, intervals with their granularity, bookmarks, gaps with their cause."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

import msgspec

from pitfs.errors import UsageError
from pitfs.model.position import AtSeq, format_instant, parse_time

if TYPE_CHECKING:
    from pitfs.store.catalog.records import Interval
    from pitfs.store.store import Store

NAME: Final = "list"
Row = dict[str, Any]


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        NAME,
        help="snapshots, intervals, bookmarks and gaps",
        description="Lists what a store can give: snapshots, intervals with their granularity, "
        "bookmarks, and gaps with their cause. Times are UTC.",
        epilog="""\
examples:
  pitfs list /srv/replica/db1
  pitfs list /srv/replica/db1 --from 1h-ago
  pitfs list /srv/replica/db1 --from 2026-11-22 --to 2026-11-23 --json""",
    )
    parser.add_argument("store", metavar="STORE", help="directory of the store")
    parser.add_argument("--from", dest="from_time", metavar="TIME", help="only what is at or after it")
    parser.add_argument("--to", dest="to_time", metavar="TIME", help="only what is before it")
    parser.add_argument("--tz", metavar="ZONE", default="UTC", help="zone of times without one (default UTC)")
    parser.add_argument(
        "--json",
        action="store_true",
        help="group, protected_through, snapshots, intervals, open_intervals, bookmarks, gaps",
    )


def run(args: argparse.Namespace) -> int:
    from pitfs.store.store import Store

    store = Store.open(args.store)
    try:
        from_ns = _bound(store, args.from_time, args.tz)
        to_ns = _bound(store, args.to_time, args.tz)
        if from_ns is not None and to_ns is not None and from_ns >= to_ns:
            raise UsageError(f"--from {args.from_time}: isn't before --to {args.to_time}: nothing lies between them")
        if args.json:
            _write_json(store, from_ns, to_ns)
        else:
            _write_text(store, from_ns, to_ns)
    finally:
        store.close()
    return 0


def _bound(store: Store, text: str | None, zone_name: str) -> int | None:
    """A bound may lie outside of what is reachable: it is the time itself, not the state at it."""
    from pitfs.cli.mount import parse_zone
    from pitfs.cli.resolve import resolve
    from pitfs.model.position import NotATimeError

    if text is None:
        return None
    try:
        wanted = parse_time(text, now_ns=time.time_ns(), zone=parse_zone(zone_name))
    except NotATimeError:
        return resolve(store, text, zone_name)[0].time_ns  # latest, or a bookmark
    if isinstance(wanted, AtSeq):
        return store.at_seq(wanted.seq).time_ns
    return wanted.time_ns


def _interval(interval: Interval) -> Row:
    return {
        "from": format_instant(interval.from_time_ns),
        "to": format_instant(interval.to_time_ns),
        "granularity_ns": interval.granularity_ns,
        "cause": interval.cause,
        "from_seq": interval.from_seq,
        "to_seq": interval.to_seq,
    }


def _rows(store: Store, from_ns: int | None, to_ns: int | None) -> Iterator[tuple[str, Iterable[Row]]]:
    """The five lists, each as it comes: none is held in memory."""

    def within(time_ns: int) -> bool:
        return (from_ns is None or time_ns >= from_ns) and (to_ns is None or time_ns < to_ns)

    streaming, last = list(store.open_intervals(from_ns, to_ns)), 0  # first: what is closed meanwhile is listed once

    def closed() -> Iterator[Row]:
        nonlocal last
        for interval in store.intervals(from_ns, to_ns):
            last = interval.end_snapshot_id
            yield _interval(interval)

    yield (
        "snapshots",
        (
            {"instant": format_instant(each.time_ns), "seq": each.seq}
            for each in store.snapshots(from_ns, to_ns)
        ),
    )
    yield (
        "intervals",
        closed(),
    )
    yield (
        "open_intervals",
        (_interval(each) for each in streaming if each.end_snapshot_id > last),
    )
    yield (
        "bookmarks",
        (
            {"name": each.name, "instant": format_instant(each.time_ns), "seq": each.seq}
            for each in store.bookmarks()
            if within(each.time_ns)
        ),
    )
    yield (
        "gaps",
        (
            {
                "from": format_instant(each.from_time_ns),
                "to": format_instant(each.to_time_ns),
                "cause": each.cause,
                "from_seq": each.from_seq,
                "to_seq": each.to_seq,
            }
            for each in store.gaps(from_ns, to_ns)
        ),
    )


def _protected_through(store: Store) -> str | None:
    return format_instant(store.protected_through_ns()) if store.latest() is not None else None


def _write_json(store: Store, from_ns: int | None, to_ns: int | None) -> None:
    """One document, written row by row."""
    encode = msgspec.json.encode
    write = sys.stdout.write
    write(f'{{"group": {encode(store.group).decode()}, ')
    write(f'"protected_through": {encode(_protected_through(store)).decode()}')
    for name, rows in _rows(store, from_ns, to_ns):
        separator = "\n  "
        write(f',\n "{name}": [')
        for row in rows:
            write(separator + encode(row).decode())
            separator = ",\n  "
        write("]")
    write("}\n")


def _write_text(store: Store, from_ns: int | None, to_ns: int | None) -> None:
    print(f"group              {store.group}")
    print(f"protected through  {_protected_through(store) or 'nothing has arrived yet'}")
    for volume in store.volumes:
        print(f"volume             {volume.name}  {volume.size_bytes} bytes, blocks of {volume.block_size}")
    for name, rows in _rows(store, from_ns, to_ns):
        title = f"\n{name.replace('_', ' ')}"
        for row in rows:
            if title:
                print(title)
                title = ""
            print(f"  {_TEXT[name](row)}")


def granularity_text(granularity_ns: int | None) -> str:
    if granularity_ns is None:
        return "snapshots only"
    if granularity_ns == 0:
        return "every write"
    for unit_ns, unit in ((10**9, "s"), (10**6, "ms"), (10**3, "µs")):
        if granularity_ns % unit_ns == 0:
            return f"every {granularity_ns // unit_ns} {unit}"
    return f"every {granularity_ns} ns"


def _interval_text(row: Row) -> str:
    text = f"{row['from']} -> {row['to']}  {granularity_text(row['granularity_ns'])}"
    return f"{text}  ({row['cause']})" if row["cause"] else text


_TEXT: Final[dict[str, Callable[[Row], str]]] = {
    "snapshots": lambda row: f"{row['instant']}  seq {row['seq']}",
    "intervals": _interval_text,
    "open_intervals": _interval_text,
    "bookmarks": lambda row: f"{row['instant']}  {row['name']}",
    "gaps": lambda row: f"{row['from']} -> {row['to']}  {row['cause']}",
}
