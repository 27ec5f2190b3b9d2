"""What of a history goes, and what each stretch of it becomes, for a policy. Pure, and a stream: nothing is held.

A snapshot stays, and its stretch says why, where

* it is the last one, or its level has all snapshots, or it is the last one of its period;
* the interval behind it keeps its bounds: one with a level of journals does, and what is coarser there stays as it is;
* a pin or a bookmark names it, or an instant in an interval that it bounds. That interval stays as it is.

The others go in runs between two that stay. A run of more than MAX_RUN, or for several reasons, goes in parts; the
first snapshot of the next part is then the end of the one before, for a while.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Final, NamedTuple

from pitfs.model.transfer import PRUNED
from pitfs.store.retention.levels import NOTHING, SNAPSHOTS, Action, Policy, Remove, Thin, period, thinned

MAX_RUN: Final = 1024  # snapshots that one Remove takes
_CAUSE: Final = f"{PRUNED}: "
ROOM: Final = "to make room"  # the reason of a floor
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
                    level, reason = floor, ROOM
                return level, reason, min(through_ns, floor_through_ns)
        return level, reason, through_ns


@dataclass(frozen=True, slots=True)
class Stretch:
    """What a stretch of time has and will have.

    Attributes:
        now_ns, then_ns: the finest granularity in it, and the one to come.
        level: SNAPSHOTS, or a coarser one to come.
        reason: the step, pin or bookmark that says so.
        snapshots, instants: how many go; of instants at least so many.
        action: that brings it about, and what the stretches before it say that have none and lose snapshots.
        freed_bytes: by the actions. Those of a removal are given, in `rows`, to the stretch whose snapshots go.
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


class _Judged(NamedTuple):
    """A state with its level, and which keepers hold the interval that ends at it, and itself."""

    state: State
    level: int
    reason: str
    held: str
    marked: str


def essential(states: Iterable[State], rule: Rule) -> Iterator[State]:
    """Leaves out what the plan is the same without: states of one step and granularity that are as they should be.

    The first and the last of them stay. Of the others nobody has to look at the rows, some 10 us for each.
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
    after_id, before, going, why = None, None, 0, (0, "")
    judged: Iterator[_Judged | None] = chain(_judged(states, rule, keepers), (None,))
    for each, following in pairwise(judged):
        assert each is not None
        stays = following is None or _stays(each, following)
        keeper = "" if stays else each.held or each.marked or (following.held if following else "")
        level, reason = (SNAPSHOTS, keeper) if keeper else (max(each.level, SNAPSHOTS), each.reason)
        is_kept, is_full, state = stays or keeper != "", going == max_run or why != (level, reason), each.state
        if is_kept and not going:
            if before is not None:
                yield _alone(before, each, level, reason)
        else:
            is_end = going > 0 and (is_kept or is_full)
            action = Remove(after_id, state.id, _CAUSE + why[1]) if is_end else None
            instants = state.seq - before.seq if before is not None and state.granularity_ns == 0 else 1
            span = (before or state).time_ns, state.time_ns, state.granularity_ns, None  # its journal goes
            yield Stretch(*span, level, reason, int(not is_kept), instants - is_kept, action)
            going, why = (0 if is_end else going) + (not is_kept), (level, reason)
        after_id, before = state.id if is_kept else after_id, state


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


def _stays(each: _Judged, following: _Judged) -> bool:
    """Whether a snapshot stays for its level, or that of the interval behind it."""
    if each.level <= SNAPSHOTS or following.level < SNAPSHOTS:
        return True
    times_ns = each.state.time_ns, following.state.time_ns
    return each.level != NOTHING and period(each.level, times_ns[0]) != period(each.level, times_ns[1])


def _alone(before: State, each: _Judged, level: int, reason: str) -> Stretch:
    """An interval that keeps its bounds."""
    state, instants, action = each.state, 0, None
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
    """Neighbours that will have the same for the same reason, as one, if they have the same now or lose snapshots."""
    last: Stretch | None = None
    for each in stretches:
        if last is None:
            last = each
        elif (last.then_ns, last.level, last.reason) != (each.then_ns, each.level, each.reason) or (
            last.now_ns != each.now_ns and not (last.snapshots and (each.snapshots or each.action))
        ):
            if isinstance(each.action, Remove):
                last = replace(last, freed_bytes=last.freed_bytes + each.freed_bytes)
                each = replace(each, freed_bytes=0)
            yield last
            last = each
        else:
            has_ns = [now_ns for now_ns in (last.now_ns, each.now_ns) if now_ns is not None]
            last = replace(
                each, from_ns=last.from_ns, now_ns=min(has_ns, default=None),
                snapshots=last.snapshots + each.snapshots, instants=last.instants + each.instants,
                freed_bytes=last.freed_bytes + each.freed_bytes,
            )  # fmt: skip
    if last is not None:
        yield last
