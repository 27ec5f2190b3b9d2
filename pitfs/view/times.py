"""Times as names: the state that a time leads to, and the directory times/ with its days, minutes and seconds (UTC)."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from typing import Final

from pitfs.errors import NoSuchInstantError
from pitfs.model.position import DAY_NS, MINUTE_NS, SECOND_NS, AtSeq, format_day, parse_instant, parse_time
from pitfs.store.store import Resolution, Store
from pitfs.view.inodes import NoEntryError, TreeEntry, day_entry, link_entry, minute_entry

GAP: Final = "-gap"  # behind the second in which a gap begins: a link to the last state before it
LINK_DEPTH: Final = 3  # times/<day>/<minute>

_DAY: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", re.ASCII)
_MINUTE: Final = re.compile(r"([01][0-9]|2[0-3])-([0-5][0-9])", re.ASCII)
_SECOND: Final = re.compile(r"([01][0-9]|2[0-3])-([0-5][0-9])-([0-5][0-9])(-gap)?", re.ASCII)

Listing = Iterator[tuple[str, TreeEntry, int]]  # name, entry, cookie of what follows


def resolve_time(
    store: Store, text: str, now_ns: int, zone: datetime.tzinfo = datetime.UTC
) -> tuple[Resolution, bool]:
    """The newest reachable state not after the time `text`, and whether it is exactly the state then.

    Raises:
        NotATimeError: the text says no time.
        NoSuchInstantError: no state answers to it.
    """
    wanted = parse_time(text, now_ns=now_ns, zone=zone)
    if isinstance(wanted, AtSeq):
        resolution = store.at_seq(wanted.seq)
        return resolution, resolution.seq == wanted.seq
    return store.at_time(wanted.time_ns)


class TimesDirectory:
    """The directory times/. Days, minutes and seconds are numbered since 1970, and so are the listings' cookies."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def day(self, name: str) -> TreeEntry:
        """The entry of that name; it and the two below raise NoEntryError where there is none."""
        start_ns = parse_instant(f"{name}T00-00-00.000000000Z") if _DAY.fullmatch(name) else None
        if start_ns is None:
            raise NoEntryError
        self._last_in(start_ns, DAY_NS)
        return day_entry(start_ns // DAY_NS)

    def minute(self, day: int, name: str) -> TreeEntry:
        match = _MINUTE.fullmatch(name)
        if match is None:
            raise NoEntryError
        minute = day * 1440 + int(match[1]) * 60 + int(match[2])
        self._last_in(minute * MINUTE_NS, MINUTE_NS)
        return minute_entry(minute)

    def second(self, minute: int, name: str) -> TreeEntry:
        match = _SECOND.fullmatch(name)
        if match is None or int(match[1]) * 60 + int(match[2]) != minute % 1440:
            raise NoEntryError
        second = minute * 60 + int(match[3])
        last = self._last_in(second * SECOND_NS, SECOND_NS)
        state = self._before_gap(second) if match[4] else last
        if state is None:
            raise NoEntryError
        return link_entry(state.seq, state.time_ns, LINK_DEPTH)

    def days(self, cookie: int) -> Listing:
        for day in self._store.days(cookie):
            yield format_day(day), day_entry(day), day + 1

    def minutes(self, day: int, cookie: int) -> Listing:
        for minute in self._store.minutes(day):
            if minute >= cookie:
                yield _clock_name(minute * 60)[:5], minute_entry(minute), minute + 1

    def seconds(self, minute: int, cookie: int) -> Listing:
        """Twice the second is its cookie: its own link and that of a gap."""
        for state in self._store.seconds(minute):
            second = state.time_ns // SECOND_NS
            if 2 * second >= cookie:
                yield _clock_name(second), link_entry(state.seq, state.time_ns, LINK_DEPTH), 2 * second + 1
            if 2 * second + 1 >= cookie and (before := self._before_gap(second)) is not None:
                yield _clock_name(second) + GAP, link_entry(before.seq, before.time_ns, LINK_DEPTH), 2 * second + 2

    def _before_gap(self, second: int) -> Resolution | None:
        """The last state before the gap that begins in that second, if one does."""
        start_ns, end_ns = second * SECOND_NS, (second + 1) * SECOND_NS
        begin = next((gap for gap in self._store.gaps(start_ns, end_ns) if gap.from_time_ns >= start_ns), None)
        return self._store.at_instant(begin.from_time_ns) if begin is not None else None

    def _last_in(self, start_ns: int, length_ns: int) -> Resolution:
        """The newest reachable state within that time; NoEntryError if there is none."""
        latest = self._store.latest()
        if latest is None:
            raise NoEntryError
        try:
            state, _ = self._store.at_time(min(start_ns + length_ns - 1, latest.time_ns))
        except NoSuchInstantError:
            raise NoEntryError from None
        if not start_ns <= state.time_ns < start_ns + length_ns:
            raise NoEntryError
        return state


def _clock_name(second: int) -> str:
    """`HH-MM-SS` of a second since 1970."""
    second %= 86_400
    return f"{second // 3600:02d}-{second // 60 % 60:02d}-{second % 60:02d}"
