"""What a plan leaves of a random history is exactly what the policy keeps, by a model that looks at all of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import hypothesis
import hypothesis.strategies as st
from hypothesis import given

from pitfs.model.ladder import RUNGS_NS
from pitfs.model.position import DAY_NS, SECOND_NS
from pitfs.store.retention.levels import LEVELS, NOTHING, SNAPSHOTS, Policy, Remove, Step, Thin, period
from pitfs.store.retention.stretches import Keeper, Rule, State, Stretch, essential, plan, rows

HOUR_NS = 3600 * SECOND_NS
EPOCH_NS = 20_000 * DAY_NS
UNTIL_NS = (SECOND_NS, 30 * SECOND_NS, HOUR_NS, 5 * HOUR_NS, DAY_NS, 9 * DAY_NS, 40 * DAY_NS, 400 * DAY_NS)


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    levels = sorted(draw(st.sets(st.integers(0, NOTHING - 1), max_size=5)))
    ages = sorted(draw(st.sets(st.sampled_from(UNTIL_NS), min_size=len(levels), max_size=len(levels))))
    return Policy(tuple(map(Step, levels, ages)))


@st.composite
def histories(draw: st.DrawFn) -> list[State]:
    steps_ns = st.sampled_from((1, 10 * SECOND_NS, 600 * SECOND_NS, HOUR_NS, 7 * HOUR_NS, DAY_NS, 17 * DAY_NS))
    granularities = st.sampled_from((0, 0, None, *RUNGS_NS))
    time_ns, seq, states = EPOCH_NS, 0, []
    for number in range(draw(st.integers(1, 40))):
        time_ns, seq = time_ns + draw(steps_ns), seq + draw(st.integers(1, 50))
        states.append(State(number + 1, seq, time_ns, draw(granularities) if number else None))
    return states


@st.composite
def kept_by_hand(draw: st.DrawFn, states: list[State]) -> list[Keeper]:
    seqs = st.integers(0, states[-1].seq + 5) | st.sampled_from([state.seq for state in states])
    bounds = draw(st.lists(st.tuples(seqs, seqs), max_size=4))
    points = [(low, low) for low, _ in bounds[:3]] + [(min(each), max(each)) for each in bounds[3:]]
    return [Keeper(low, high, f"{low}-{high}") for low, high in sorted(points)]


@dataclass
class Model:
    """Says of each snapshot and interval what is to become of it, by looking at the whole history."""

    states: list[State]
    rule: Rule
    keepers: list[Keeper]

    def level(self, state: State) -> int:
        age_ns = self.rule.reference_ns - state.time_ns
        fitting = [step.level for step in self.rule.policy.steps if age_ns <= step.until_ns]
        by_policy = fitting[0] if fitting else (NOTHING if self.rule.policy.steps else 0)
        floors = [floor for through_ns, floor in self.rule.floors if state.time_ns <= through_ns]
        return max(by_policy, *floors[:1], 0)

    def is_held(self, number: int) -> bool:
        """Whether a keeper is in the interval that ends at that state."""
        low, high = self.states[number - 1].seq, self.states[number].seq
        return number > 0 and any(each.from_seq < high and each.to_seq > low for each in self.keepers)

    def stays(self, number: int) -> bool:
        if number == len(self.states) - 1:
            return True
        state, after = self.states[number], self.states[number + 1]
        if any(each.from_seq <= state.seq <= each.to_seq for each in self.keepers):
            return True
        if self.is_held(number) or self.is_held(number + 1):
            return True
        level = self.level(state)
        if level == NOTHING:
            return self.level(after) < SNAPSHOTS
        if level <= SNAPSHOTS or self.level(after) < SNAPSHOTS:
            return True
        of_period = [each for each in self.states if period(level, each.time_ns) == period(level, state.time_ns)]
        return of_period[-1] is state

    def result(self) -> list[State]:
        found = []
        for number, state in enumerate(self.states):
            if not self.stays(number):
                continue
            granularity_ns = state.granularity_ns
            if number == 0 or not found or found[-1].id != self.states[number - 1].id:
                granularity_ns = None  # it is joined, or nothing is before it
            elif granularity_ns is not None and not self.is_held(number):
                level = self.level(state)
                granularity_ns = max(granularity_ns, (0, *RUNGS_NS[-2::-1])[level]) if level < SNAPSHOTS else None
            found.append(State(state.id, state.seq, state.time_ns, granularity_ns))
        return found


def applied(states: list[State], stretches: list[Stretch], max_run: int) -> list[State]:
    """Executes the actions one by one."""
    for stretch in stretches:
        match stretch.action:
            case Thin(end_id, granularity_ns):
                (state,) = [each for each in states if each.id == end_id]
                assert state.granularity_ns is not None
                assert granularity_ns is None or granularity_ns > state.granularity_ns
                thin = State(state.id, state.seq, state.time_ns, granularity_ns)
                states = [thin if each is state else each for each in states]
            case Remove(after_id, before_id):
                gone = [each for each in states if (after_id or 0) < each.id < before_id]
                assert 0 < len(gone) <= max_run
                assert after_id is None or any(each.id == after_id for each in states)
                (end,) = [each for each in states if each.id == before_id]
                joined = State(end.id, end.seq, end.time_ns, None)
                states = [joined if each is end else each for each in states if each not in gone]
    return states


@hypothesis.settings(max_examples=150)
@given(data=st.data())
def test_what_stays_is_what_the_policy_keeps(data: st.DataObject) -> None:
    states, policy = data.draw(histories()), data.draw(policies())
    keepers, max_run = data.draw(kept_by_hand(states)), data.draw(st.sampled_from((1, 2, 3, 1024)))
    reference_ns = states[-1].time_ns - data.draw(st.sampled_from((-DAY_NS, 0, 0, DAY_NS)))
    through_ns = data.draw(st.sampled_from([state.time_ns for state in states]))
    floor = data.draw(st.integers(0, NOTHING))
    floors = data.draw(st.sampled_from(((), ((through_ns, floor), (1 << 63, max(0, floor - 1))))))
    rule = Rule(policy, reference_ns, floors)
    model = Model(states, rule, keepers)

    stretches = list(plan(states, rule, keepers, max_run))
    left = applied(states, stretches, max_run)
    assert left == model.result()

    shown = list(rows(replace(each, freed_bytes=isinstance(each.action, Remove)) for each in stretches))
    assert all(row.snapshots for row in shown if row.freed_bytes)  # what a removal frees stands where snapshots go
    if max_run == 1024:
        assert all(row.freed_bytes for row in shown if row.snapshots)
    assert sum(row.snapshots for row in shown) == len(states) - len(left)
    assert [row.from_ns for row in shown][1:] == [row.to_ns for row in shown][:-1]
    assert not shown or (shown[0].from_ns, shown[-1].to_ns) == (states[0].time_ns, states[-1].time_ns)
    if max_run == 1024 and not floors:
        again = [stretch for stretch in plan(left, rule, keepers) if stretch.action is not None]
        assert applied(left, again, max_run) == Model(left, rule, keepers).result()


@given(data=st.data())
def test_the_plan_is_the_same_without_what_is_not_essential(data: st.DataObject) -> None:
    states, policy = data.draw(histories()), data.draw(policies())
    rule, keepers = Rule(policy, states[-1].time_ns), data.draw(kept_by_hand(states))
    assert list(rows(plan(essential(states, rule), rule, keepers))) == list(rows(plan(states, rule, keepers)))
    actions, of_all = (
        [stretch.action for stretch in plan(which, rule, keepers) if stretch.action]
        for which in (essential(states, rule), states)
    )
    assert actions == of_all


def test_levels_have_the_words_of_the_contract() -> None:
    assert LEVELS[:2] == ("every-write", "1ms") and LEVELS[9:] == (
        "10s", "snapshots", "hourly", "daily", "weekly", "monthly", "yearly", "nothing"
    )  # fmt: skip
