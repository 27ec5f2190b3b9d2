"""What of a history goes, and what each stretch of it becomes, for a policy. Pure, and a stream: nothing is held.

A snapshot stays, and its stretch says why, where

* it is the last one, or its level has all snapshots, or it is the last one of its period;
* the interval behind it keeps its bounds: one with a level of journals does, and what is coarser there stays as it is;
* a pin or a bookmark names it, or an instant in an interval that it bounds. That interval stays as it is.

The others go in runs between two that stay. A run of more than MAX_RUN goes in parts; the first snapshot of the next
part is then the end of the one before, for a while.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from pitfs.model.retention import (
    LEVELS,
    NOTHING,
    SNAPSHOTS,
    Action,
    Policy,
    Remove,
    Thin,
    granularity_of_level,
    period,
)
from pitfs.model.transfer import PRUNED

MAX_RUN: Final = 1024  # snapshots that one Remove takes
_CAUSE: Final = f"{PRUNED}: "
_ALWAYS: Final = 1 << 63


class State(NamedTuple):
    """A snapshot, and the granularity of the interval that ends at it."""

    id: int
    seq: int
    time_ns: int
    granularity_ns: int | None


@dataclass(frozen=True, slots=True)
class Keeper:
    """A pin or bookmark: all from one seq through another stays, and why."""

    from_seq: int
    to_seq: int
    reason: str


@dataclass(frozen=True, slots=True)
class Rule:
    """The level of each time.

    Attributes:
        reference_ns: ages count from it.
        floors: (through_ns, level), by time: up to that time nothing finer is kept, to make room.
    """

    policy: Policy
    reference_ns: int
    floors: tuple[tuple[int, int], ...] = ()

    def at(self, time_ns: int) -> tuple[int, str, int]:
        """The level, which step or lack of room says so, and through which time that holds."""
        level, reason, since_ns = self.policy.level_at(self.reference_ns - time_ns)
        through_ns = _ALWAYS if since_ns is None else self.reference_ns - since_ns - 1
        for floor_through_ns, floor in self.floors:
            if time_ns <= floor_through_ns:
                if floor > level:
                    level, reason = floor, f"{LEVELS[floor]} to make room"
                return level, reason, min(through_ns, floor_through_ns)
        return level, reason, through_ns


def thinned(granularity_ns: int | None, level: int) -> int | None:
    """The granularity that an interval of this one has at a level."""
    wanted_ns = granularity_of_level(level)
    return None if granularity_ns is None or wanted_ns is None else max(granularity_ns, wanted_ns)


@dataclass(frozen=True, slots=True)
class Stretch:
    """What a stretch of time has and will have.

    Attributes:
        now_ns, then_ns: the finest granularity in it, and the one to come.
        level: SNAPSHOTS, or a coarser one to come.
        reason: the step, pin or bookmark that says so.
        snapshots, instants: how many go; of instants at least so many.
        action: that brings it about, and what the stretches before it say that have none and lose snapshots.
        freed_bytes: by the actions.
    """

    from_ns: int
    to_ns: int
    now_ns: int | None
    then_ns: int | None
    level: int
    reason: str
    snapshots: int = 0
    instants: int = 0
    action: Action | None = None
    freed_bytes: int = 0

    def and_then(self, later: Stretch) -> Stretch:
        """This one and the one behind it, which has or will have the same, as one."""
        return replace(
            later, from_ns=self.from_ns, snapshots=self.snapshots + later.snapshots,
            instants=self.instants + later.instants, freed_bytes=self.freed_bytes + later.freed_bytes,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Judged:
    """A state with its level, and which keepers hold the interval that ends at it, and itself."""

    state: State
    level: int
    reason: str
    held: str
    marked: str


@dataclass(slots=True)
class _Run:
    """Snapshots that go, since the last one that stays."""

    after_id: int | None = None
    going: int = 0
    reason: str = ""
    stretches: list[Stretch] = field(default_factory=list)

    def add(self, stretch: Stretch) -> None:
        last = self.stretches.pop() if self.stretches else None
        if last is not None and (last.level, last.reason) == (stretch.level, stretch.reason):
            finest_ns = min((each for each in (last.now_ns, stretch.now_ns) if each is not None), default=None)
            stretch = last.and_then(replace(stretch, now_ns=finest_ns))
        elif last is not None:
            self.stretches.append(last)
        self.stretches.append(stretch)

    def remove(self, before_id: int) -> Iterator[Stretch]:
        """Its stretches; the last one has the action."""
        last = self.stretches.pop()
        yield from self.stretches
        yield replace(last, action=Remove(self.after_id, before_id, _CAUSE + self.reason))
        self.going, self.stretches = 0, []


def essential(states: Iterable[State], rule: Rule) -> Iterator[State]:
    """Leaves out what the plan is the same without: states of one step and granularity that are as they should be.

    The first and the last of them stay. That makes planning of a long history five times as fast.
    """
    through_ns, granularity_ns, passed = -_ALWAYS, None, None
    for state in states:
        if state.time_ns <= through_ns and state.granularity_ns == granularity_ns:
            passed = state
            continue
        if passed is not None:
            yield passed
        yield state
        passed, granularity_ns = None, state.granularity_ns
        level, _, through_ns = rule.at(state.time_ns)
        if level > SNAPSHOTS or thinned(granularity_ns, level) != granularity_ns:
            through_ns = -_ALWAYS
    if passed is not None:
        yield passed


def plan(
    states: Iterable[State], rule: Rule, keepers: Iterable[Keeper] = (), max_run: int = MAX_RUN
) -> Iterator[Stretch]:
    """What becomes of each stretch of a history, by time.

    Args:
        states: by time; the interval of each begins at the one before.
        keepers: by from_seq.
    """
    run, before = _Run(), None
    for each, following in _pairs(_judged(states, rule, keepers)):
        state = each.state
        stays = following is None or _stays(each, following)
        keeper = "" if stays else each.held or each.marked or (following.held if following else "")
        reason = keeper or each.reason
        if not stays and not keeper:
            run.add(_in_run(before, each, reason, left=0))
            if run.going == max_run:
                yield from run.remove(state.id)
            run.going, run.reason = run.going + 1, reason
        elif run.going:
            run.add(_in_run(before, each, reason, left=1))
            yield from run.remove(state.id)
        elif before is not None:
            yield _alone(before, each, reason)
        if stays or keeper:
            run.after_id = state.id
        before = state


def _judged(states: Iterable[State], rule: Rule, keepers: Iterable[Keeper]) -> Iterator[_Judged]:
    coming = iter(keepers)
    head, reach = next(coming, None), Keeper(-1, -1, "")  # the next, and of those before it the one that ends last
    before_seq = _ALWAYS
    for state in states:
        while head is not None and head.from_seq < state.seq:
            reach, head = max(reach, head, key=lambda keeper: keeper.to_seq), next(coming, None)
        held = reach.reason if reach.to_seq > before_seq else ""
        marked = reach.reason if reach.to_seq >= state.seq else ""
        if head is not None and head.from_seq == state.seq:
            marked = head.reason
        level, reason, _ = rule.at(state.time_ns)
        yield _Judged(state, level, reason, held, marked)
        before_seq = state.seq


def _pairs(judged: Iterator[_Judged]) -> Iterator[tuple[_Judged, _Judged | None]]:
    """Each with the one that follows it."""
    each = next(judged, None)
    while each is not None:
        following = next(judged, None)
        yield each, following
        each = following


def _stays(each: _Judged, following: _Judged) -> bool:
    """Whether a snapshot stays for its level, or that of the interval behind it."""
    if each.level <= SNAPSHOTS or following.level < SNAPSHOTS:
        return True
    times_ns = each.state.time_ns, following.state.time_ns
    return each.level != NOTHING and period(each.level, times_ns[0]) != period(each.level, times_ns[1])


def _in_run(before: State | None, each: _Judged, reason: str, left: int) -> Stretch:
    """An interval whose journal goes with a snapshot that bounds it; `left`: instants of it that stay."""
    state, level = each.state, max(each.level, SNAPSHOTS)
    if before is None:
        return Stretch(state.time_ns, state.time_ns, None, None, level, reason, 1, 1)
    instants = state.seq - before.seq if state.granularity_ns == 0 else 1
    return Stretch(
        before.time_ns, state.time_ns, state.granularity_ns, None, level, reason, 1 - left, instants - left
    )  # fmt: skip


def _alone(before: State, each: _Judged, reason: str) -> Stretch:
    """An interval that keeps its bounds."""
    state, level, instants, action = each.state, max(each.level, SNAPSHOTS), 0, None
    now_ns, then_ns = state.granularity_ns, thinned(state.granularity_ns, each.level)
    if then_ns != now_ns and each.held:
        then_ns, level, reason = now_ns, SNAPSHOTS, each.held
    elif then_ns != now_ns:
        action = Thin(state.id, then_ns, _CAUSE + each.reason)
        if now_ns == 0:
            left = 1 if then_ns is None else state.time_ns // then_ns - before.time_ns // then_ns + 1
            instants = max(0, state.seq - before.seq - left)
    return Stretch(before.time_ns, state.time_ns, now_ns, then_ns, level, reason, 0, instants, action)


def rows(stretches: Iterable[Stretch]) -> Iterator[Stretch]:
    """Neighbours that have, and will have, the same for the same reason, as one; without actions."""
    last: Stretch | None = None
    for each in stretches:
        alike = last is not None and all(
            getattr(last, name) == getattr(each, name) for name in ("now_ns", "then_ns", "level", "reason")
        )
        if last is not None and not alike:
            yield last
        last = replace(last.and_then(each) if last is not None and alike else each, action=None)
    if last is not None:
        yield last
