"""What retention is to do in a store: by its policy, by the ages of what it has, and by the room that there is."""

from __future__ import annotations

import heapq
import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import replace
from typing import Final

from pitfs.errors import PitfsError, UsageError
from pitfs.model.position import format_instant
from pitfs.model.units import format_bytes
from pitfs.store.opening import free_bytes, read_store_info
from pitfs.store.pins.pins import list_pins
from pitfs.store.retention.levels import LEVELS, NOTHING, SNAPSHOTS, AgeClock, Remove
from pitfs.store.retention.policy import load_policy
from pitfs.store.retention.pruner import Progress, Pruner
from pitfs.store.retention.stretches import MAX_RUN, ROOM, Keeper, Rule, State, Stretch, essential, plan, rows

PAGE_ROWS: Final = 4096
# What is given up, in this order, where a size is set and no steps.
DEFAULT_LADDER: Final = tuple(map(LEVELS.index, ("every-write", "1s", "snapshots", "hourly", "daily")))
FORETOLD_RUNS: Final = 100  # of states that go to make room: as many are looked at, at most
_EVER: Final = 1 << 63


class Retention(AbstractContextManager["Retention"]):
    """The policy of a store, to be foretold or applied; excludes others that prune it, if it changes anything.

    Args:
        path: of the store.
        changes: whether it is to be applied.
        clock: the replica's, nanoseconds since the epoch.

    Raises:
        UsageError: no policy is set.
        StoreError, PitfsError: as `Pruner` does. Also from every method.
    """

    def __init__(self, path: str, changes: bool, clock: Callable[[], int] = time.time_ns) -> None:
        read_store_info(path)
        policy = load_policy(path)
        if policy is None:
            raise UsageError(f"{path}: no policy is set, it keeps everything: see pitfs retention --help")
        self.path, self.policy = path, policy
        self.lacking_bytes = 0  # that nothing is left to give up for
        with ExitStack() as stack:
            self._pruner = stack.enter_context(Pruner(path, changes))
            self._catalog = self._pruner.catalog
            self._clock = self._ages(clock())
            self._rule = Rule(policy, self._clock.reference_ns, self._floors(self._excess_bytes()))
            self._closing = stack.pop_all()

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def foretold(self) -> Iterator[Stretch]:
        """A row for each stretch of time, with the bytes that it frees."""
        return rows(self._foretold(self._rule))

    def drastic(self) -> str:
        """What may not have been meant: that the policy keeps nothing, or that most goes to make room; or ""."""
        total, going, last = sum(1 for _ in self._states()), Counter[bool](), self._catalog.last_snapshot()
        for each in self._plan(self._rule):
            going[each.reason == ROOM] += each.snapshots
        if last is not None and any(going.values()):
            if sum(each.snapshots for each in plan(self._states(), self._rule)) == total - 1:
                newest = f"the newest snapshot, {format_instant(last.time_ns)}"
                return f"nothing but {newest}, and what bookmarks and pins keep would be left"
            if 2 * going[True] > total:
                return f"{going[True]} of {total} snapshots would go to make room"
        return ""

    def lack(self) -> str:
        """That the sizes of the policy can't be held, and what is left."""
        left = "the newest snapshot, what is behind it, and what bookmarks and pins keep"
        return f"{self.path}: {format_bytes(self.lacking_bytes)} more than the policy allows: only {left} is left"

    def apply(self, progress: Callable[[Progress], None] = lambda _: None) -> Progress:
        """Prunes; says what was done."""
        clock, catalog = self._clock, self._catalog
        if not clock.newest_ns:
            return Progress()  # nothing has arrived yet
        catalog.remember(age_limit_ns=clock.limit_ns, age_clock_ns=clock.clock_ns, age_newest_ns=clock.newest_ns)
        if self.policy.bookmarks_ns is not None:
            catalog.expire_bookmarks(clock.reference_ns - self.policy.bookmarks_ns)
        first = catalog.first_snapshot()
        actions = (stretch.action for stretch in self._plan(self._rule, MAX_RUN) if stretch.action is not None)
        done = self._pruner.apply(actions, progress)
        now_first = catalog.first_snapshot()
        if now_first != first and now_first is not None:
            catalog.remember(pruned_before_ns=now_first.time_ns)
        return done

    def _ages(self, clock_ns: int) -> AgeClock:
        catalog = self._catalog
        last = catalog.last_snapshot()
        newest_ns = max((each.to_time_ns for each in catalog.open_intervals()), default=0)
        newest_ns = max(newest_ns, last.time_ns if last is not None else 0)
        before = AgeClock(*map(catalog.meta, ("age_limit_ns", "age_clock_ns", "age_newest_ns")))
        if before.clock_ns:
            return before.at(newest_ns, clock_ns)
        return AgeClock(min(newest_ns, clock_ns), clock_ns, newest_ns)

    # The plan

    def _plan(self, rule: Rule, max_run: int = _EVER) -> Iterator[Stretch]:
        states = map(self._verified, essential(self._states(), rule))
        return plan(states, rule, self._keepers(), max_run)

    def _states(self) -> Iterator[State]:
        """All snapshots as the catalog has them, unverified."""
        first = self._catalog.first_snapshot()
        if first is None:
            return
        yield State(first.id, first.seq, first.time_ns, None)
        columns, last_id = "snapshot, to_seq, to_time_ns, granularity_ns, from_snapshot", first.id
        sql = f"SELECT {columns} FROM intervals WHERE snapshot > ? ORDER BY snapshot LIMIT {PAGE_ROWS}"
        while found := self._catalog.rows(sql, (last_id,)):
            for *state, base_id in found:
                if base_id != last_id:
                    what = f"no interval leads on from snapshot {last_id}: it is being pruned, or is damaged"
                    raise PitfsError(f"{self.path}: {what}: try again, then pitfs check")
                last_id = state[0]
                yield State._make(state)

    def _verified(self, state: State) -> State:
        interval = self._catalog.interval_to(state.id)
        if interval is None:  # the first one, whose row is verified
            return state
        return State(state.id, interval.to_seq, interval.to_time_ns, interval.granularity_ns)

    def _keepers(self) -> Iterator[Keeper]:
        """What bookmarks and pins keep, by the seq where it begins."""
        age_ns = self.policy.bookmarks_ns
        from_ns = None if age_ns is None else self._clock.reference_ns - age_ns
        bookmarks = (Keeper(each.seq, each.seq, f"bookmark {each.name}") for each in self._catalog.bookmarks(from_ns))
        pins = []
        for reader in list_pins(self.path):
            reason = f"pinned by {reader.what} (pid {reader.pid})"
            pins += [Keeper(position.seq, position.seq, reason) for position in reader.instants]
            if reader.unlisted is not None:
                pins.append(Keeper(reader.unlisted.least.seq, reader.unlisted.greatest.seq, reason))
        pins.sort(key=lambda keeper: keeper.from_seq)
        return heapq.merge(bookmarks, pins, key=lambda keeper: keeper.from_seq)

    # Room

    def _foretold(self, rule: Rule, max_run: int = _EVER) -> Iterator[Stretch]:
        """The plan with the bytes that each action frees besides those before it."""
        last_id: int | None = -1
        told_bytes = 0  # of the removals behind the same snapshot: each frees what those before do, and more
        for stretch in self._plan(rule, max_run):
            action, size = stretch.action, 0
            if action is not None:
                size = self._pruner.foretell(action)
            if isinstance(action, Remove):
                told_bytes = told_bytes if action.after_id == last_id else 0
                last_id, size, told_bytes = action.after_id, size - told_bytes, size
            yield replace(stretch, freed_bytes=size)

    def _excess_bytes(self) -> int:
        """What must go for the policy's sizes."""
        excess, policy = 0, self.policy
        if policy.max_size_bytes is not None:
            excess = used_bytes(self.path) - policy.max_size_bytes
        if policy.min_free_bytes is not None:
            excess = max(excess, policy.min_free_bytes - free_bytes(self.path))
        return excess

    def _floors(self, excess_bytes: int) -> tuple[tuple[int, int], ...]:
        """What is kept at most, so that what is foretold fits: granularity goes before states, the oldest first."""
        last = self._catalog.last_snapshot()
        if excess_bytes <= 0 or last is None:
            return ()
        ladder = [step.level for step in self.policy.steps] or list(DEFAULT_LADDER)
        ladder += [SNAPSHOTS] if ladder[-1] < SNAPSHOTS else []
        runs = 1 + sum(1 for _ in self._states()) // FORETOLD_RUNS
        before = Rule(self.policy, self._clock.reference_ns)
        total_bytes = sum(size for _, _, size in self._sizes(before, _EVER))
        for level in (*ladder[1:], NOTHING):
            if total_bytes >= excess_bytes:
                return before.floors
            floors = ((_EVER, level),) if level < NOTHING else ((last.time_ns - 1, level), *before.floors)
            rule, others = replace(before, floors=floors), self._sizes(before, _EVER)
            freed_bytes, other = 0, next(others, None)
            for _, to_ns, size in self._sizes(rule, runs if level == NOTHING else _EVER):
                freed_bytes += size
                while other is not None and other[0] < to_ns:  # what would be counted twice is counted once
                    total_bytes, other = total_bytes - other[2], next(others, None)
                if freed_bytes + total_bytes >= excess_bytes:
                    return (to_ns - (level == NOTHING), level), *before.floors
            before, total_bytes = rule, freed_bytes
        self.lacking_bytes = excess_bytes - total_bytes
        return before.floors

    def _sizes(self, rule: Rule, max_run: int) -> Iterator[tuple[int, int, int]]:
        """Of each action: from when on and up to when something goes, and what it frees."""
        from_ns: int | None = None
        for each in self._foretold(rule, max_run):
            from_ns = each.from_ns if from_ns is None else from_ns
            if each.action is not None:
                yield from_ns, each.to_ns, each.freed_bytes
            if each.action is not None or not each.snapshots:
                from_ns = None


def used_bytes(path: str) -> int:
    """What the files below a directory take on the disk; those that go meanwhile count as nothing."""
    total = 0
    with suppress(FileNotFoundError), os.scandir(path) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                total += used_bytes(entry.path) if stat.S_ISDIR(status.st_mode) else status.st_blocks * 512
    return total
