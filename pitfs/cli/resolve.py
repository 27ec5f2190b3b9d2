"""`pitfs resolve`: the canonical instant that a time leads to. Also how the other commands read a TIME."""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import msgspec

from pitfs.errors import NoSuchInstantError, UsageError
from pitfs.model.position import NotATimeError, format_instant

if TYPE_CHECKING:
    from pitfs.store.store import Resolution, Store

NAME: Final = "resolve"
TIME_HELP: Final = (
    "whatever the mount understands: an instant, RFC 3339 or ISO 8601, @EPOCH, seq-N, 5m-ago; "
    "also latest, or a bookmark's name (or bookmarks/NAME)"
)


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        NAME,
        help="the instant that a time leads to",
        description="Prints the canonical instant of the newest reachable state not after TIME.",
        epilog="""\
examples:
  pitfs resolve /srv/replica/db1 5m-ago
  pitfs resolve /srv/replica/db1 "2026-11-22 23:54" --tz Europe/Vienna
  pitfs resolve /srv/replica/db1 before-upgrade --json""",
    )
    add_store_and_time(parser)
    parser.add_argument(
        "--strict", action="store_true", help="fail unless the state at exactly TIME is there"
    )
    parser.add_argument("--json", action="store_true", help="instant, seq, kind, granularity_ns, exact")


def add_store_and_time(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="directory of the store")
    parser.add_argument("time", metavar="TIME", help=TIME_HELP)
    parser.add_argument("--tz", metavar="ZONE", default="UTC", help="zone of times without one (default UTC)")


def run(args: argparse.Namespace) -> int:
    from pitfs.store.store import Store

    store = Store.open(args.store)
    try:
        resolution, exact = resolve(store, args.time, args.tz, warn=not args.strict)
    finally:
        store.close()
    if args.strict and not exact:
        raise NoSuchInstantError(
            f"{args.store}: the state at exactly {args.time!r} can't be given; the newest before it is "
            f"{format_instant(resolution.time_ns)}: use that, or leave --strict out"
        )
    if args.json:
        print_json(
            {
                "instant": format_instant(resolution.time_ns),
                "seq": resolution.seq,
                "kind": resolution.kind,
                "granularity_ns": resolution.granularity_ns,
                "exact": exact,
            }
        )
    else:
        print(format_instant(resolution.time_ns))
    return 0


def _warn_of_gap(store: Store, text: str, resolution: Resolution) -> None:
    """Says so where the time lies in a gap: the state that it leads to may be much older."""
    for gap in store.gaps(resolution.time_ns, resolution.time_ns + 1):
        if gap.from_time_ns == resolution.time_ns:
            begin, end = format_instant(gap.from_time_ns), format_instant(gap.to_time_ns)
            print(
                f"pitfs: {text} lies in the gap {begin} -> {end} ({gap.cause}): this is the last state before it",
                file=sys.stderr,
            )


def resolve(store: Store, text: str, zone_name: str = "UTC", warn: bool = True) -> tuple[Resolution, bool]:
    """The newest reachable state not after TIME, and whether it is exactly the state at TIME.

    Args:
        warn: say on standard error where TIME lies in a gap.

    Raises:
        UsageError: TIME is neither a time nor a bookmark's name.
        NoSuchInstantError: no state answers to it.
    """
    from pitfs.cli.mount import parse_zone
    from pitfs.view.times import resolve_time

    zone: datetime.tzinfo = parse_zone(zone_name)
    if text == "latest":
        latest = store.latest()
        if latest is None:
            raise NoSuchInstantError(f"{store.path}: {_reachable(store)}")
        return latest, True
    name = text.removeprefix("bookmarks/")
    if name == text:
        try:
            resolution, exact = resolve_time(store, text, time.time_ns(), zone)
            if warn and not exact:
                _warn_of_gap(store, text, resolution)
            return resolution, exact
        except NotATimeError as error:
            not_a_time: UsageError = error
        except NoSuchInstantError:
            reachable = _reachable(store)
            raise NoSuchInstantError(f"{store.path}: no state answers to {text!r}: {reachable}") from None
    bookmark = store.bookmark(name)
    if bookmark is not None:
        resolution = store.at_seq(bookmark.seq)
        return resolution, resolution.seq == bookmark.seq
    if name == text:
        raise UsageError(f"{not_a_time}; nor is there a bookmark of that name in {store.path}")
    raise NoSuchInstantError(f"{store.path}: no bookmark {name!r}: pitfs list shows them")


def _reachable(store: Store) -> str:
    first = store.first()
    if first is None:
        return "nothing has arrived yet: wait for the first full copy"
    through = format_instant(store.protected_through_ns())
    return f"{format_instant(first.time_ns)} (seq {first.seq}) through {through} can be reached"


def volume_index(store: Store, name: str) -> int:
    """Index of the volume of that name.

    Raises:
        UsageError: there is none.
    """
    names = [volume.name for volume in store.volumes]
    if name not in names:
        raise UsageError(f"{store.path}: no volume {name!r}: there are {', '.join(names)}")
    return names.index(name)


def print_json(document: object) -> None:
    print(msgspec.json.format(msgspec.json.encode(document), indent=2).decode())
