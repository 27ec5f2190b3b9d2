"""The TIME, ZONE and VOLUME of a command line, and the states and volumes of a store that they name."""

from __future__ import annotations

import datetime
import itertools
import time
import zoneinfo
from typing import TYPE_CHECKING, Final

from pitfs.cli.common.output import span_row, span_text
from pitfs.cli.common.output import warn as print_warning
from pitfs.errors import NoSuchInstantError, UsageError
from pitfs.model.position import FORMS, LATEST, NotATimeError, format_instant, meant_time

if TYPE_CHECKING:
    from pitfs.store.store import Resolution, Store

IN_BOOKMARKS: Final = "bookmarks/"
MAX_COMPARED: Final = 10_000  # bookmarks, for one that may have been meant: some 0.2 s


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
        warn: print a line on standard error where TIME lies in a gap, or is a bookmark's name, too.

    Raises:
        UsageError: TIME is neither a time nor a bookmark's name.
        NoSuchInstantError: no state answers to it.
    """
    from pitfs.view.times import resolve_time

    zone, now_ns = parse_zone(zone_name), time.time_ns()
    name = text.removeprefix(IN_BOOKMARKS)
    bookmark = store.bookmark(name)
    problem = None
    if name == text:
        try:
            resolution, exact = _latest(store) if text == LATEST else resolve_time(store, text, now_ns, zone)
        except NotATimeError as error:
            problem = error
        except NoSuchInstantError:
            raise NoSuchInstantError(f"{store.path}: no state answers to {text!r}: {_reachable(store)}") from None
        else:
            if warn and not exact:
                _warn_of_gap(store, text, resolution)
            if warn and bookmark is not None:
                print_warning(f"{text} is read as a time: the bookmark of that name is {IN_BOOKMARKS}{name}")
            return resolution, exact
    if bookmark is not None:
        resolution = store.at_seq(bookmark.seq)
        return resolution, resolution.seq == bookmark.seq
    if problem is None:
        hint = _did_you_mean(_close_names(store, name), before=IN_BOOKMARKS)
        raise NoSuchInstantError(f"{store.path}: no bookmark {name!r}: {hint}pitfs list shows them")
    newest = store.latest()
    meant = meant_time(text, now_ns=now_ns, newest_ns=newest.time_ns if newest else now_ns, zone=zone)
    hint = _did_you_mean([meant] if meant else _close_names(store, text, LATEST))
    raise UsageError(
        f"{problem}, nor is there a bookmark of that name in {store.path}: {hint}{'W' if hint else 'w'}rite for "
        f"example {FORMS}"
    )


def _latest(store: Store) -> tuple[Resolution, bool]:
    latest = store.latest()
    if latest is None:
        raise NoSuchInstantError
    return latest, True


def _close_names(store: Store, name: str, *others: str) -> list[str]:
    """Names of bookmarks, or others, that may have been meant."""
    import difflib  # 3 ms that only this case pays

    names = (each.name for each in itertools.islice(store.bookmarks(), MAX_COMPARED))
    return difflib.get_close_matches(name[:64], dict.fromkeys((*others, *names)))


def _did_you_mean(names: list[str], before: str = "") -> str:
    return f"did you mean {' or '.join(before + name for name in names)}? " if names else ""


def _warn_of_gap(store: Store, text: str, resolution: Resolution) -> None:
    """Prints a line about the gap that the time lies in: the state may be much older than the time."""
    for gap in store.gaps(resolution.time_ns, resolution.time_ns + 1):
        if gap.from_time_ns == resolution.time_ns:
            bounds = span_text(span_row(gap))
            print_warning(f"{text} lies in the gap {bounds} ({gap.cause}): this is the last state before it")


def _reachable(store: Store) -> str:
    first = store.first()
    if first is None:
        return "nothing has arrived yet: wait for the first full sync"
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
