"""The TIME, ZONE and VOLUME of a command line, and the states and volumes of a store that they name."""

from __future__ import annotations

import datetime
import time
import zoneinfo
from typing import TYPE_CHECKING

from pitfs.cli.common.output import span_row, span_text, warn
from pitfs.errors import NoSuchInstantError, UsageError
from pitfs.model.position import NotATimeError, format_instant

if TYPE_CHECKING:
    from pitfs.store.store import Resolution, Store


def parse_zone(name: str) -> datetime.tzinfo:
    """The time zone of that name.

    Raises:
        UsageError: there is none.
    """
    if name == "UTC":  # also where no zones are installed
        return datetime.UTC
    try:
        return zoneinfo.ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise UsageError(f"time zone {name!r}: unknown: write a name such as Europe/Vienna") from None


def resolve(store: Store, text: str, zone_name: str = "UTC", warn: bool = True) -> tuple[Resolution, bool]:
    """The newest reachable state not after TIME, and whether it is exactly the state at TIME.

    Args:
        warn: print a line on standard error where TIME lies in a gap.

    Raises:
        UsageError: TIME is neither a time nor a bookmark's name.
        NoSuchInstantError: no state answers to it.
    """
    from pitfs.view.times import resolve_time

    zone = parse_zone(zone_name)
    if text == "latest":
        latest = store.latest()
        if latest is None:
            raise NoSuchInstantError(f"{store.path}: {_reachable(store)}")
        return latest, True
    name = text.removeprefix("bookmarks/")
    problem = None
    if name == text:
        try:
            resolution, exact = resolve_time(store, text, time.time_ns(), zone)
        except NotATimeError as error:
            problem = error
        except NoSuchInstantError:
            raise NoSuchInstantError(f"{store.path}: no state answers to {text!r}: {_reachable(store)}") from None
        else:
            if warn and not exact:
                _warn_of_gap(store, text, resolution)
            return resolution, exact
    bookmark = store.bookmark(name)
    if bookmark is not None:
        resolution = store.at_seq(bookmark.seq)
        return resolution, resolution.seq == bookmark.seq
    if problem is not None:
        raise UsageError(f"{problem}; nor is there a bookmark of that name in {store.path}")
    raise NoSuchInstantError(f"{store.path}: no bookmark {name!r}: pitfs list shows them")


def _warn_of_gap(store: Store, text: str, resolution: Resolution) -> None:
    """Prints a line about the gap that the time lies in: the state may be much older than the time."""
    for gap in store.gaps(resolution.time_ns, resolution.time_ns + 1):
        if gap.from_time_ns == resolution.time_ns:
            bounds = span_text(span_row(gap))
            warn(f"{text} lies in the gap {bounds} ({gap.cause}): this is the last state before it")


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
