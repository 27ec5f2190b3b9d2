"""Positions, canonical instant names, and everything a user may type for a time. Pure.

Grammar of `parse_time` (INTERFACE "The tree in the mount"); anything else is `NotATimeError`:

    time      = calendar | epoch | sequence | ago
    calendar  = date [("T" | "t" | " " | "_") clock [[" "] zone]] | full-date zone
    date      = YYYY | YYYY-MM | full-date        full-date = YYYY-MM-DD | YYYYMMDD
    clock     = HH[:MM[:SS[frac]]] | HH[-MM[-SS[frac]]] | HH[MM[SS[frac]]]
    frac      = ("." | ",") digits                                 cut, not rounded, after nine digits
    zone      = "Z" | "z" | "UTC" | ("+" | "-") HH[[":" | "-"]MM]   none: the zone given by the caller
    epoch     = "@" ["-"] digits ["." digits]                      seconds since 1970-01-01T00:00:00Z
    sequence  = "seq-" digits
    ago       = (digits ("w" | "d" | "h" | "m" | "s"))+ "-ago"     before the given now; d is 24 h

A missing part counts as zero (a missing month or day as the first). `24:00` is the end of the day, second
60 (a leap second) is the second after 59. Local times: one that exists twice (the clock was set back) is
the **earlier** of the two, so that what is shown is never newer than what may have been meant, and one that
never existed (the clock was set forward) is read as if the clock hadn't been set; who means something else
writes the offset. Times outside int64 nanoseconds are clamped to its ends: no state is there anyway.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import re
from typing import Final

from pitfs.errors import UsageError

SECOND_NS: Final = 1_000_000_000
MINUTE_NS: Final = 60 * SECOND_NS
DAY_SECONDS: Final = 86_400
DAY_NS: Final = DAY_SECONDS * SECOND_NS
MAX_TEXT_LENGTH: Final = 255  # longest file name; a limit for the command line too
MAX_SEQ: Final = (1 << 63) - 1
LATEST: Final = "latest"  # the newest state, wherever a time may stand
_MIN_TIME_NS: Final = -(1 << 63)
_MAX_TIME_NS: Final = (1 << 63) - 1
_EPOCH_ORDINAL: Final = datetime.date(1970, 1, 1).toordinal()
_EPOCH: Final = datetime.datetime(1970, 1, 1)
_SECONDS_OF_UNIT: Final = {"w": 604_800, "d": DAY_SECONDS, "h": 3_600, "m": 60, "s": 1}


class NotATimeError(UsageError):
    """The text is no way to say a time."""

    def __init__(self, text: str) -> None:
        shown = text if len(text) <= 80 else text[:80] + "…"
        super().__init__(f"{shown!r} is not a time")


FORMS: Final = "2026-11-22T23:54:00Z, 2026-11-22, @1795391640.25, seq-1234 or 5m-ago"  # for messages


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Position:
    """The state that all writes up to and with `seq` make; the last of them was at `time_ns` (UTC)."""

    seq: int
    time_ns: int

    @property
    def instant(self) -> str:
        """The canonical instant."""
        return format_instant(self.time_ns)


@dataclasses.dataclass(frozen=True, slots=True)
class AtTime:
    """What was typed means a time (UTC nanoseconds)."""

    time_ns: int


@dataclasses.dataclass(frozen=True, slots=True)
class AtSeq:
    """What was typed means a write."""

    seq: int


# ------------------------------------------------------------------ canonical instants


@functools.lru_cache(maxsize=64)  # listings walk day by day
def format_day(day: int) -> str:
    """`YYYY-MM-DD` of a day counted from 1970-01-01."""
    return datetime.date.fromordinal(day + _EPOCH_ORDINAL).isoformat()


def format_instant(time_ns: int) -> str:
    """The canonical instant of a time: `YYYY-MM-DDTHH-MM-SS.nnnnnnnnnZ`."""
    seconds, nanoseconds = divmod(time_ns, SECOND_NS)
    day, second_of_day = divmod(seconds, DAY_SECONDS)
    minute_of_day, second = divmod(second_of_day, 60)
    hour, minute = divmod(minute_of_day, 60)
    return f"{format_day(day)}T{hour:02d}-{minute:02d}-{second:02d}.{nanoseconds:09d}Z"


def whole_second(instant: str) -> str:
    """A canonical instant without what is below a second: for messages."""
    return f"{instant[:19]}Z"


def parse_instant(text: str) -> int | None:
    """The time (ns) of a canonical instant; None if the text isn't exactly one."""
    try:
        moment = datetime.datetime.fromisoformat(text[:11] + text[11:19].replace("-", ":"))
        since = moment.replace(tzinfo=None) - _EPOCH
        time_ns = (since.days * DAY_SECONDS + since.seconds) * SECOND_NS + int(text[20:29])
    except ValueError:
        return None
    if not _MIN_TIME_NS <= time_ns <= _MAX_TIME_NS:
        return None
    # Python reads more forms than this one: then the canonical instant is another text.
    return time_ns if format_instant(time_ns) == text else None


# ------------------------------------------------------------------ whatever a user types

_DATE = r"(?P<year>[0-9]{4})(?:-(?P<month>[0-9]{2})(?:-(?P<day>[0-9]{2}))?)?"
_BASIC_DATE = r"(?P<year>[0-9]{4})(?P<month>[0-9]{2})(?P<day>[0-9]{2})"
_FRACTION = r"(?:[.,](?P<fraction>[0-9]+))?"
_CLOCKS = tuple(
    rf"(?P<hour>[0-9]{{2}})(?:{mark}(?P<minute>[0-9]{{2}})(?:{mark}(?P<second>[0-9]{{2}}){_FRACTION})?)?"
    for mark in ("-", ":", "")
)
_ZONE = (
    r"(?:[ ]?(?:(?P<utc>Z|z|UTC)|(?P<sign>[+-])(?P<zone_hour>[0-9]{2})(?:[:-]?(?P<zone_minute>[0-9]{2}))?))?"
)
_DATE_ZONE = r"(?:(?P<utc>Z|z)|(?P<sign>[+-])(?P<zone_hour>[0-9]{2}):?(?P<zone_minute>[0-9]{2}))?"
_FULL_DATES = (r"(?P<year>[0-9]{4})-(?P<month>[0-9]{2})-(?P<day>[0-9]{2})", _BASIC_DATE)
# Tried in this order: HH-MM-SS comes before HH-MM with an offset.
_CALENDAR = tuple(
    re.compile(pattern, re.ASCII)
    for pattern in (
        *(f"{date}[Tt _]{clock}{_ZONE}" for date in _FULL_DATES for clock in _CLOCKS),
        *(f"{date}{_DATE_ZONE}" for date in _FULL_DATES),
        _DATE,
    )
)
_EPOCH_SECONDS = re.compile(r"@(-?[0-9]+)(?:\.([0-9]+))?", re.ASCII)
_SEQUENCE = re.compile(r"seq-([0-9]+)", re.ASCII)
_AGO = re.compile(r"((?:[0-9]+[wdhms])+)-ago", re.ASCII)
_AGO_PART = re.compile(r"([0-9]+)([wdhms])", re.ASCII)


def parse_time(text: str, *, now_ns: int, zone: datetime.tzinfo = datetime.UTC) -> AtTime | AtSeq:
    """What a user means by `text`.

    Args:
        now_ns: what `-ago` counts from.
        zone: zone of local times, those without `Z` or an offset.

    Raises:
        NotATimeError: it's none of the forms above; nothing else is ever raised, whatever the text.
    """
    if len(text) > MAX_TEXT_LENGTH:
        raise NotATimeError(text)
    if match := _SEQUENCE.fullmatch(text):
        return AtSeq(min(int(match[1]), MAX_SEQ))
    if match := _EPOCH_SECONDS.fullmatch(text):
        digits = (match[2] or "").ljust(9, "0")
        # The division cuts downwards: a rest below a nanosecond makes a negative time earlier.
        return AtTime(_clamp(int(match[1] + digits) // 10 ** (len(digits) - 9)))
    if match := _AGO.fullmatch(text):
        seconds = sum(int(count) * _SECONDS_OF_UNIT[unit] for count, unit in _AGO_PART.findall(match[1]))
        return AtTime(_clamp(now_ns - seconds * SECOND_NS))
    for pattern in _CALENDAR:
        if match := pattern.fullmatch(text):
            time_ns = _calendar_ns(match.groupdict(), zone)
            if time_ns is not None:
                return AtTime(_clamp(time_ns))
    raise NotATimeError(text)


def _clamp(time_ns: int) -> int:
    return max(_MIN_TIME_NS, min(time_ns, _MAX_TIME_NS))


def _calendar_ns(part: dict[str, str | None], zone: datetime.tzinfo) -> int | None:
    """Time of the matched parts; None if they are no date, time of day or offset."""
    hour, minute, second = (int(part.get(name) or 0) for name in ("hour", "minute", "second"))
    fraction_ns = int((part.get("fraction") or "")[:9].ljust(9, "0"))
    if hour == 24:
        if minute or second or fraction_ns:
            return None
    elif hour > 24 or minute > 59 or second > (60 if minute == 59 else 59):
        return None
    try:
        date = datetime.date(int(part["year"] or 0), int(part.get("month") or 1), int(part.get("day") or 1))
    except ValueError:
        return None
    local_seconds = (date.toordinal() - _EPOCH_ORDINAL) * DAY_SECONDS + hour * 3600 + minute * 60 + second
    if part.get("utc"):
        offset_seconds: int | None = 0
    elif part.get("sign"):
        zone_hour, zone_minute = int(part["zone_hour"] or 0), int(part["zone_minute"] or 0)
        if zone_hour > 23 or zone_minute > 59:
            return None
        offset_seconds = (zone_hour * 3600 + zone_minute * 60) * (-1 if part["sign"] == "-" else 1)
    else:
        offset_seconds = _local_offset_seconds(local_seconds, zone)
    if offset_seconds is None:
        return None
    return (local_seconds - offset_seconds) * SECOND_NS + fraction_ns


def _local_offset_seconds(local_seconds: int, zone: datetime.tzinfo) -> int | None:
    """Offset of the zone from UTC at a local time; fold 0: the earlier of two (PEP 495)."""
    try:
        local = _EPOCH + datetime.timedelta(seconds=local_seconds)
        offset = local.replace(tzinfo=zone, fold=0).utcoffset()
    except OverflowError:  # the last hours of the year 9999, the first of the year 1
        return None
    # A zone's historic offset may have a part of a second only in theory; floor keeps "not after".
    return 0 if offset is None else offset // datetime.timedelta(seconds=1)


# ------------------------------------------------------------------ what reads as a time to people

_DAYS_SINCE_TODAY: Final = {None: 0, "today": 0, "yesterday": -1}
_WORDS: Final = frozenset({LATEST, "now", "tomorrow", "today", "yesterday"})
_CLOCK_BEGINS = re.compile(r"[0-9]{2}[:-][0-9]{2}", re.ASCII)
_DAY_AND_CLOCK = re.compile(r"(?:(today|yesterday)[t _-]*|t)?([0-9]{1,2}[:-][0-9]{2}.*)?", re.ASCII)
_LOOSE_PART = re.compile(
    r"([0-9]+) ?(?:(w)(?:eeks?)?|(d)(?:ays?)?|(h)(?:ours?)?|(m)(?:in(?:ute)?s?)?|(s)(?:ec(?:ond)?s?)?)[ _-]*", re.ASCII
)
_LOOSE_AGO = re.compile(rf"(?:{_LOOSE_PART.pattern})+(?:ago)?", re.ASCII)


def reads_as_time(name: str) -> bool:
    """Whether a name says a time, to `parse_time` and the mount or to people: then no new bookmark gets it.

    Production refuses such a name, where names enter. Older productions did not: what they sent is received and kept,
    and is reached under bookmarks/.
    """
    is_clock = _CLOCK_BEGINS.match(name) is not None and _is_time(f"2026-01-01T{name}")
    return is_clock or name.lower() in _WORDS or _is_time(name.lower())


def meant_time(text: str, *, now_ns: int, newest_ns: int, zone: datetime.tzinfo = datetime.UTC) -> str | None:
    """What may have been meant by a text that is no time: a text that is one, or None.

    A time of day is taken on the last day on which it isn't after `newest_ns`, the time of the newest state.
    """
    typed = text.strip().lower()
    if len(typed) > MAX_TEXT_LENGTH:
        return None
    if typed in (LATEST, "now"):
        return LATEST
    for form in (typed, typed.replace("/", "-"), typed.replace("_", "-")):
        if _is_time(form):
            return form
    if _LOOSE_AGO.fullmatch(typed):
        return "".join("".join(filter(None, part)) for part in _LOOSE_PART.findall(typed)) + "-ago"
    match = _DAY_AND_CLOCK.fullmatch(typed)
    if match is None or not any(match.groups()):
        return None
    word, clock = match[1], match[2] or ""
    clock = f"0{clock}" if clock[1:2] in (":", "-") else clock
    last_day = _local_day(now_ns if word else newest_ns, zone) + _DAYS_SINCE_TODAY[word]
    for day in (last_day, last_day - 1):
        form = f"{format_day(day)}T{clock}" if clock else format_day(day)
        if not _is_time(form):
            return None
        wanted = parse_time(form, now_ns=now_ns, zone=zone)
        if word or (isinstance(wanted, AtTime) and wanted.time_ns <= newest_ns):
            return form
    return None


def _is_time(text: str) -> bool:
    try:
        parse_time(text, now_ns=0)
    except NotATimeError:
        return False
    return True


def _local_day(time_ns: int, zone: datetime.tzinfo) -> int:
    moment = _EPOCH.replace(tzinfo=datetime.UTC) + datetime.timedelta(seconds=time_ns // SECOND_NS)
    return moment.astimezone(zone).toordinal() - _EPOCH_ORDINAL
