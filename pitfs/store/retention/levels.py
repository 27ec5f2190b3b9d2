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
    """An interval's difference journal is brought to a coarser rung, or goes: None.

    The cause is for the catalog; it begins with `model.transfer.PRUNED`.
    """

    end_snapshot_id: int
    granularity_ns: int | None
    cause: str


@dataclass(frozen=True, slots=True)
class Remove:
    """The snapshots strictly between two kept ones go; they become one interval, snapshots only, with that cause.

    With after_id None all snapshots before before_id go, which becomes the first state.
    """

    after_id: int | None
    before_id: int
    cause: str


Action = Thin | Remove


def _month(time_ns: int) -> int:
    date = datetime.date.fromordinal(datetime.date(1970, 1, 1).toordinal() + time_ns // DAY_NS)
    return date.year * 12 + date.month - 1


# The number of the period that a time is in.
_PERIODS: Final[dict[str, Callable[[int], int]]] = {
    "hourly": lambda time_ns: time_ns // (60 * MINUTE_NS),
    "daily": lambda time_ns: time_ns // DAY_NS,
    "weekly": lambda time_ns: (time_ns // DAY_NS + 3) // 7,  # 1970 began on a Thursday
    "monthly": _month,
    "yearly": lambda time_ns: _month(time_ns) // 12,
}
_GRANULARITIES_NS: Final = RUNGS_NS[::-1]  # by level
_RUNGS: Final = [f"{ns // SECOND_NS}s" if ns >= SECOND_NS else f"{ns // 10**6}ms" for ns in _GRANULARITIES_NS[1:]]
LEVELS: Final = ("every-write", *_RUNGS, "snapshots", *_PERIODS, "nothing")
SNAPSHOTS: Final = LEVELS.index("snapshots")
NOTHING: Final = LEVELS.index("nothing")
_WORDS: Final = (
    "every write",
    *(f"a state every {name}" for name in _RUNGS),
    "all snapshots",
    *(f"the last snapshot of each {name}" for name in ("hour", "day", "week", "month", "year")),
)

_AGE: Final = re.compile(r"([0-9]{1,9})(y|w|d|h|min|m|s)")
# Largest first; an age is shown in the first that it is whole in, in weeks never.
_UNITS_NS: Final = {
    "y": 365 * DAY_NS, "d": DAY_NS, "h": 60 * MINUTE_NS, "m": MINUTE_NS, "s": SECOND_NS,
    "w": 7 * DAY_NS, "min": MINUTE_NS,
}  # fmt: skip
_EXAMPLE: Final = '"every-write 3d, 1s 14d, snapshots 30d, hourly 90d, daily 2y"'


def thinned(granularity_ns: int | None, level: int) -> int | None:
    """The granularity at a level of an interval that has this one."""
    if granularity_ns is None or level >= SNAPSHOTS:
        return None
    return max(granularity_ns, _GRANULARITIES_NS[level])


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
        if since_ns is None:
            return level, LEVELS[level], None
        age = format_age(since_ns)
        return level, f"older than {age}" if level == NOTHING else f"{LEVELS[level]} from {age} on", since_ns


@dataclass(frozen=True, slots=True)
class AgeClock:
    """What ages count from: the newest state, and never faster than the replica's own clock since a state arrived.

    So a stalled store doesn't age, whatever the replica's clock says, and a sender whose clock jumps makes nothing old.

    Attributes:
        limit_ns: the most that ages may count from: it goes with the replica's clock.
        clock_ns, newest_ns: the replica's clock, and the time of the newest state, when that was said.
    """

    limit_ns: int
    clock_ns: int
    newest_ns: int

    @property
    def reference_ns(self) -> int:
        """The time that has the age 0."""
        return min(self.limit_ns, self.newest_ns)

    def at(self, newest_ns: int, clock_ns: int) -> AgeClock:
        """As it stands later, which by the replica's clock may be earlier."""
        limit_ns = self.limit_ns + max(0, clock_ns - self.clock_ns)
        if newest_ns != self.newest_ns:  # while nothing arrives the limit goes on: ages catch up after a stall
            limit_ns = min(limit_ns, newest_ns)
        return AgeClock(limit_ns, clock_ns, newest_ns)


def parse_steps(text: str) -> tuple[Step, ...]:
    """The steps of `--set`: "every-write 3d, 1s 14d, snapshots 30d".

    Raises:
        UsageError: they aren't ones.
    """
    steps: list[Step] = []
    for part in map(str.strip, text.split(",")):
        words = part.split()
        if len(words) != 2:
            what = {0: "a step is missing", 1: "its age is missing"}.get(len(words), "too many words")
            raise UsageError(f"{part!r}: {what}: write a granularity and an age for each step: {_EXAMPLE}")
        if words[0] not in LEVELS[:NOTHING]:
            raise UsageError(f"{part!r}: unknown granularity: there are {', '.join(LEVELS[:NOTHING])}")
        step, before = Step(LEVELS.index(words[0]), parse_age(words[1])), steps[-1] if steps else Step(-1, 0)
        if step.level <= before.level:
            raise UsageError(f"{part!r}: isn't coarser than {LEVELS[before.level]} before it: the finest comes first")
        if step.until_ns <= before.until_ns:
            raise UsageError(f"{part!r}: isn't more than {format_age(before.until_ns)} before it: ages have to grow")
        steps.append(step)
    return tuple(steps)


def parse_age(text: str) -> int:
    """An age in nanoseconds; a year has 365 days.

    Raises:
        UsageError: it isn't one, or is 0.
    """
    match = _AGE.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r}: an age is a whole number with one of y, w, d, h, m (or min), s, as 14d")
    if int(match[1]) == 0:
        raise UsageError(f"{text!r}: an age of 0 keeps nothing: write 1s or more")
    return int(match[1]) * _UNITS_NS[match[2]]


def format_steps(steps: tuple[Step, ...]) -> str:
    """What `parse_steps` reads."""
    return ", ".join(f"{LEVELS[step.level]} {format_age(step.until_ns)}" for step in steps)


def format_age(age_ns: int) -> str:
    """What `parse_age` reads."""
    return next(f"{age_ns // size_ns}{unit}" for unit, size_ns in _UNITS_NS.items() if age_ns % size_ns == 0)


def in_words(policy: Policy) -> list[str]:
    """A policy in words: a sentence for each thing that it says."""
    steps = [f"{_WORDS[step.level]} up to an age of {format_age(step.until_ns)}" for step in policy.steps]
    room = "" if policy.max_size_bytes is None and policy.min_free_bytes is None else ", as long as there is room"
    everything = f"Keeps everything{room}."
    sentences = [f"Keeps {', '.join(steps)}; of what is older nothing but bookmarks." if steps else everything]
    if policy.bookmarks_ns is not None:
        sentences.append(f"Keeps bookmarks up to an age of {format_age(policy.bookmarks_ns)}.")
    for size_bytes, where in (
        (policy.max_size_bytes, "the store takes more than {}"),
        (policy.min_free_bytes, "less than {} is left on its file system"),
    ):
        if size_bytes is not None:
            sentences.append(f"Coarsens the oldest first where {where.format(format_bytes(size_bytes))}.")
    return sentences
