"""Retention: which granularity a store keeps up to which age; and the actions that bring a history to that. Pure.

A *level* is what is kept of a stretch of time; its number is its place in LEVELS, finest first:

    every-write, 1ms … 10s   all snapshots, and of the difference journals what that granularity needs
    snapshots                all snapshots
    hourly … yearly          the last snapshot of each period (UTC; weeks begin on Monday)
    nothing                  behind the last step

A *step* of a policy is a level and the age up to which it holds. The age of an interval is that of its end.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from pitfs.errors import UsageError
from pitfs.model.ladder import RUNGS_NS
from pitfs.model.position import DAY_NS, MINUTE_NS, SECOND_NS
from pitfs.model.units import format_bytes


@dataclass(frozen=True, slots=True)
class Thin:
    """An interval's difference journal is brought to a coarser granularity.

    Attributes:
        end_snapshot_id: of the snapshot at the interval's end.
        granularity_ns: a coarser rung; None: the journal goes.
        cause: for the catalog; begins with `model.transfer.PRUNED`.
    """

    end_snapshot_id: int
    granularity_ns: int | None
    cause: str


@dataclass(frozen=True, slots=True)
class Remove:
    """The snapshots strictly between two kept ones go; they become one interval, snapshots only.

    Attributes:
        after_id: None: all snapshots before before_id go, which becomes the first state.
        cause: as that of Thin.
    """

    after_id: int | None
    before_id: int
    cause: str


Action = Thin | Remove


def _month(time_ns: int) -> int:
    date = datetime.date.fromordinal(datetime.date(1970, 1, 1).toordinal() + time_ns // DAY_NS)
    return date.year * 12 + date.month - 1


def _rung_name(granularity_ns: int) -> str:
    return f"{granularity_ns // SECOND_NS}s" if granularity_ns >= SECOND_NS else f"{granularity_ns // 10**6}ms"


_GRANULARITIES_NS: Final = tuple(reversed(RUNGS_NS))  # by level
_RUNG_NAMES: Final = [_rung_name(each) for each in _GRANULARITIES_NS[1:]]
# The number of the period that a time is in.
_PERIODS: Final[dict[str, Callable[[int], int]]] = {
    "hourly": lambda time_ns: time_ns // (60 * MINUTE_NS),
    "daily": lambda time_ns: time_ns // DAY_NS,
    "weekly": lambda time_ns: (time_ns // DAY_NS + 3) // 7,  # 1970 began on a Thursday
    "monthly": _month,
    "yearly": lambda time_ns: _month(time_ns) // 12,
}
LEVELS: Final = ("every-write", *_RUNG_NAMES, "snapshots", *_PERIODS, "nothing")
SNAPSHOTS: Final = LEVELS.index("snapshots")
NOTHING: Final = LEVELS.index("nothing")
_WORDS: Final = (
    "every write",
    *(f"every {name.rstrip('ms')} {name.lstrip('0123456789')}" for name in _RUNG_NAMES),
    "all snapshots",
    *(f"the last snapshot of each {name}" for name in ("hour", "day", "week", "month", "year")),
)

_AGE: Final = re.compile(r"([0-9]{1,9})(y|w|d|h|min|m|s)")
_UNITS: Final = {  # of ages, largest first; the first that an age is whole in is shown
    "y": (365 * DAY_NS, "year"),
    "d": (DAY_NS, "day"),
    "h": (60 * MINUTE_NS, "hour"),
    "m": (MINUTE_NS, "minute"),
    "s": (SECOND_NS, "second"),
}
_AGE_NS: Final = {unit: size for unit, (size, _) in _UNITS.items()} | {"w": 7 * DAY_NS, "min": MINUTE_NS}
_EXAMPLE: Final = '"every-write 3d, 1s 14d, snapshots 30d, hourly 90d, daily 2y"'


def granularity_of_level(level: int) -> int | None:
    """The granularity of difference journals; None: it has none."""
    return _GRANULARITIES_NS[level] if level < SNAPSHOTS else None


def period(level: int, time_ns: int) -> int:
    """The number of the period, of a level between snapshots and nothing, that a time is in."""
    return _PERIODS[LEVELS[level]](time_ns)


@dataclass(frozen=True, slots=True)
class Step:
    """A level, and the age up to which it holds; that age is in."""

    level: int
    until_ns: int


@dataclass(frozen=True, slots=True)
class Policy:
    """What a store keeps.

    Attributes:
        steps: finest first, ages growing; none: it keeps everything.
        bookmarks_ns: the age up to which bookmarks are kept; None: for ever.
        max_size_bytes: more than that it doesn't take. min_free_bytes: less than that isn't left on its file system.
    """

    steps: tuple[Step, ...] = ()
    bookmarks_ns: int | None = None
    max_size_bytes: int | None = None
    min_free_bytes: int | None = None

    def level_at(self, age_ns: int) -> tuple[int, str, int | None]:
        """The level at that age, which step says so, and the age from which on it holds; None: for all younger ones."""
        level, since_ns = (NOTHING if self.steps else 0), None
        for step in reversed(self.steps):
            if age_ns > step.until_ns:
                since_ns = step.until_ns
                break
            level = step.level
        return level, LEVELS[level] + ("" if since_ns is None else f" from {format_age(since_ns)} on"), since_ns


@dataclass(frozen=True, slots=True)
class AgeClock:
    """What ages count from: the newest state, and never faster than the replica's own clock since a state arrived.

    So a stalled store doesn't age, whatever the replica's clock says, and a sender whose clock jumps makes nothing old.

    Attributes:
        limit_ns: the most that ages may count from now: it goes with the replica's clock.
        clock_ns: the replica's clock, newest_ns: time of the newest state, when that was said.
    """

    limit_ns: int
    clock_ns: int
    newest_ns: int

    @property
    def reference_ns(self) -> int:
        """The time that has the age 0."""
        return min(self.limit_ns, self.newest_ns)

    def at(self, newest_ns: int, clock_ns: int) -> AgeClock:
        """As it stands at a later time, which may be an earlier one by the replica's clock."""
        limit_ns = self.limit_ns + max(0, clock_ns - self.clock_ns)
        if newest_ns != self.newest_ns:  # where none has arrived the limit goes on: it catches up after a stall
            limit_ns = min(limit_ns, newest_ns)
        return AgeClock(limit_ns, clock_ns, newest_ns)


def parse_steps(text: str) -> tuple[Step, ...]:
    """The steps of `--set`: "every-write 3d, 1s 14d, snapshots 30d".

    Raises:
        UsageError: they aren't ones.
    """
    steps: list[Step] = []
    for part in text.split(","):
        words = part.split()
        if len(words) != 2:
            raise UsageError(f"{part.strip()!r}: a step is a granularity and the age up to which it holds: {_EXAMPLE}")
        name, age = words
        if name not in LEVELS[:NOTHING]:
            known = f"there are {', '.join(LEVELS[:NOTHING])}"
            what = "isn't a rung" if re.fullmatch(r"[0-9.]+ *[a-z]*", name) else "unknown granularity"
            raise UsageError(f"{part.strip()!r}: {name!r}: {what}: {known}")
        step = Step(LEVELS.index(name), parse_age(age))
        if steps and step.level <= steps[-1].level:
            raise UsageError(
                f"{part.strip()!r}: {name} isn't coarser than {LEVELS[steps[-1].level]} before it: "
                f"write the finest step first: {_EXAMPLE}"
            )
        if steps and step.until_ns <= steps[-1].until_ns:
            raise UsageError(
                f"{part.strip()!r}: {age} isn't more than {format_age(steps[-1].until_ns)} before it: "
                "ages grow from step to step"
            )
        steps.append(step)
    return tuple(steps)


def parse_age(text: str) -> int:
    """An age in nanoseconds; a year has 365 days.

    Raises:
        UsageError: it isn't one, or is 0.
    """
    match = _AGE.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r}: an age is a whole number with one of y, w, d, h, m, s, as 14d")
    if int(match[1]) == 0:
        raise UsageError(f"{text!r}: an age of 0 keeps nothing: leave the step out")
    return int(match[1]) * _AGE_NS[match[2]]


def format_steps(steps: tuple[Step, ...]) -> str:
    """What `parse_steps` reads."""
    return ", ".join(f"{LEVELS[step.level]} {format_age(step.until_ns)}" for step in steps)


def format_age(age_ns: int) -> str:
    """What `parse_age` reads."""
    number, unit = _in_units(age_ns)
    return f"{number}{unit}"


def _in_units(age_ns: int) -> tuple[int, str]:
    unit = next(unit for unit, (size_ns, _) in _UNITS.items() if age_ns % size_ns == 0)
    return age_ns // _UNITS[unit][0], unit


def _age_in_words(age_ns: int) -> str:
    number, unit = _in_units(age_ns)
    return f"{number} {_UNITS[unit][1]}{'s' if number != 1 else ''}"


def in_words(policy: Policy) -> list[str]:
    """A policy in words: a sentence for each thing that it says."""
    steps = [f"{_WORDS[step.level]} up to {_age_in_words(step.until_ns)}" for step in policy.steps]
    sentences = [f"Keeps {', '.join(steps)}." if steps else "Keeps everything."]
    if policy.steps:
        bookmarks = "" if policy.bookmarks_ns is None else f", these up to {_age_in_words(policy.bookmarks_ns)}"
        sentences.append(f"Of what is older: nothing but bookmarks{bookmarks}.")
    elif policy.bookmarks_ns is not None:
        sentences.append(f"Keeps the names of bookmarks up to {_age_in_words(policy.bookmarks_ns)}.")
    if policy.max_size_bytes is not None:
        size = format_bytes(policy.max_size_bytes)
        sentences.append(f"Coarsens the oldest first where the store takes more than {size}.")
    if policy.min_free_bytes is not None:
        free = format_bytes(policy.min_free_bytes)
        sentences.append(f"Coarsens the oldest first where less than {free} are left on its file system.")
    return sentences
