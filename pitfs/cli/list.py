"""`pitfs list`: snapshots, intervals with their granularity, bookmarks, gaps with their cause."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

from pitfs.cli.common.output import (
    SILENT_S,
    granularity_text,
    silence,
    span_row,
    span_text,
    state_row,
    write_json,
)
from pitfs.cli.common.parser import add_json, add_store, add_zone
from pitfs.cli.common.times import parse_zone, resolve
from pitfs.errors import UsageError
from pitfs.model.position import AtSeq, NotATimeError, format_instant, parse_time

if TYPE_CHECKING:
    from pitfs.model.transfer import Gap
    from pitfs.store.catalog.records import Interval
    from pitfs.store.store import Store

Row = dict[str, Any]

DESCRIPTION: Final = (
    "Lists what a store can give: snapshots, intervals with their granularity, "
    "bookmarks, and gaps with their cause. Times are UTC."
)
EXAMPLES: Final = """\
examples:
  pitfs list /srv/pitfs/db1
  pitfs list /srv/pitfs/db1 --from 1h-ago
  pitfs list /srv/pitfs/db1 --from 2026-11-22 --to 2026-11-23 --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    from_help = "leave out what ends before it; TIME as for pitfs resolve"
    parser.add_argument("--from", dest="from_time", metavar="TIME", help=from_help)
    parser.add_argument("--to", dest="to_time", metavar="TIME", help="leave out what begins at it or later")
    add_zone(parser)
    add_json(parser, "group, protected_through, snapshots, intervals, open_intervals, bookmarks, gaps")


def run(args: argparse.Namespace) -> int:
    from pitfs.store.store import Store

    with contextlib.closing(Store.open(args.store)) as store:
        from_ns = _bound(store, args.from_time, args.tz)
        to_ns = _bound(store, args.to_time, args.tz)
        if from_ns is not None and to_ns is not None and from_ns >= to_ns:
            raise UsageError(f"--from {args.from_time} isn't before --to {args.to_time}: nothing lies between")
        through = format_instant(store.protected_through_ns()) if store.latest() is not None else None
        lists = _lists(store, from_ns, to_ns)
        if args.json:
            head: list[tuple[str, Any]] = [("group", store.group), ("protected_through", through)]
            write_json(itertools.chain(head, lists))
        else:
            _print(store, through, lists)
    return 0


def _bound(store: Store, text: str | None, zone_name: str) -> int | None:
    """The time itself, not the state at it: a bound may lie outside of what is reachable."""
    if text is None:
        return None
    try:
        wanted = parse_time(text, now_ns=time.time_ns(), zone=parse_zone(zone_name))
    except NotATimeError:
        return resolve(store, text, zone_name)[0].time_ns  # latest, or a bookmark
    return store.at_seq(wanted.seq).time_ns if isinstance(wanted, AtSeq) else wanted.time_ns


def _gap_row(gap: Gap | Interval) -> Row:
    return {**span_row(gap), "from_seq": gap.from_seq, "to_seq": gap.to_seq}


def _interval_row(interval: Interval) -> Row:
    return {**_gap_row(interval), "granularity_ns": interval.granularity_ns}


def _lists(store: Store, from_ns: int | None, to_ns: int | None) -> Iterator[tuple[str, Iterator[Row]]]:
    """The five lists, each as it is read: none is held in memory."""
    # Read first: what is closed meanwhile is listed once.
    open_intervals, last_id = list(store.open_intervals(from_ns, to_ns)), 0

    def closed() -> Iterator[Row]:
        nonlocal last_id
        for interval in store.intervals(from_ns, to_ns):
            last_id = interval.end_snapshot_id
            yield _interval_row(interval)

    bookmarks = itertools.takewhile(lambda each: to_ns is None or each.time_ns < to_ns, store.bookmarks(from_ns))
    yield "snapshots", map(state_row, store.snapshots(from_ns, to_ns))
    yield "intervals", closed()
    yield "open_intervals", (_interval_row(each) for each in open_intervals if each.end_snapshot_id > last_id)
    yield "bookmarks", ({"name": each.name, **state_row(each)} for each in bookmarks)
    yield "gaps", map(_gap_row, store.gaps(from_ns, to_ns))


def _print(store: Store, through: str | None, lists: Iterable[tuple[str, Iterator[Row]]]) -> None:
    print(f"group              {store.group}")
    age_s = (time.time_ns() - store.protected_through_ns()) / 1e9 if through else 0.0
    print(f"protected through  {through or 'nothing has arrived yet'}")
    if age_s > SILENT_S:
        print(f"note               {silence(age_s)}")
    for volume in store.volumes:
        print(f"volume             {volume.name}  {volume.size_bytes} bytes, blocks of {volume.block_size}")
    for name, rows in lists:
        for number, row in enumerate(rows):
            if number == 0:
                print(f"\n{name.replace('_', ' ')}")
            print(f"  {_TEXT[name](row)}")


def _interval_text(row: Row) -> str:
    text = f"{span_text(row)}  {granularity_text(row['granularity_ns'])}"
    return f"{text}  ({row['cause']})" if row["cause"] else text


_TEXT: Final[dict[str, Callable[[Row], str]]] = {
    "snapshots": lambda row: f"{row['instant']}  seq {row['seq']}",
    "intervals": _interval_text,
    "open_intervals": _interval_text,
    "bookmarks": lambda row: f"{row['instant']}  {row['name']}",
    "gaps": lambda row: f"{span_text(row)}  {row['cause']}",
}
