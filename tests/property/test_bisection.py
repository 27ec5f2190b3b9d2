"""The search of `pitfs bisect` against a naive one, over histories with any states and any answers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pitfs.restore.bisection import MAX_UNKNOWN, Bisection, Verdict

GOOD, BAD, UNKNOWN = Verdict.GOOD, Verdict.BAD, Verdict.UNKNOWN


class Naive:
    """A history as a list of seqs and what a test says of each."""

    def __init__(self, states: list[int], verdicts: list[Verdict]) -> None:
        self.states, self.verdicts = states, dict(zip(states, verdicts, strict=True))
        self.tested: list[int] = []

    def newest(self, seq: int) -> int:
        return self.states[bisect_right(self.states, seq) - 1]

    def search(self) -> Bisection:
        bisection = Bisection(self.states[0], self.states[-1], self.newest)
        for seq in iter(bisection.next, None):
            assert bisection.good < seq < bisection.bad and seq in self.verdicts and seq not in self.tested
            self.tested.append(seq)
            bisection.tell(seq, self.verdicts[seq])
        return bisection


@st.composite
def histories(draw: st.DrawFn, middle: Callable[[int], st.SearchStrategy[list[Verdict]]]) -> Naive:
    """From a good state to a bad one; dense, sparse, or here so and there so."""
    steps = draw(st.lists(st.one_of(st.just(1), st.integers(1, 1000)), min_size=1, max_size=60))
    states = [draw(st.integers(0, 10**9))]
    for step in steps:
        states.append(states[-1] + step)
    return Naive(states, [GOOD, *draw(middle(len(states) - 2)), BAD])


def any_verdicts(count: int) -> st.SearchStrategy[list[Verdict]]:
    return st.lists(st.sampled_from(Verdict), min_size=count, max_size=count)


@st.composite
def one_break(draw: st.DrawFn, count: int) -> list[Verdict]:
    """Good up to some state, bad from there on; of some nothing can be told."""
    first_bad = draw(st.integers(0, count))
    told = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    return [(GOOD if i < first_bad else BAD) if told[i] else UNKNOWN for i in range(count)]


@given(histories(any_verdicts))
def test_what_is_found_is_a_good_state_and_a_bad_one_with_nothing_told_between(history: Naive) -> None:
    found = history.search()
    assert history.verdicts[found.good] is GOOD and history.verdicts[found.bad] is BAD and found.good < found.bad
    between = [seq for seq in history.states if found.good < seq < found.bad]
    assert {history.verdicts[seq] for seq in between} <= {UNKNOWN}
    assert found.unknown == between and set(between) <= set(history.tested)


@given(histories(one_break))
def test_the_first_bad_state_is_found_as_a_naive_search_finds_it(history: Naive) -> None:
    found = history.search()
    assert found.bad == next(seq for seq in history.states if history.verdicts[seq] is BAD)
    assert found.good == max(seq for seq in history.states if history.verdicts[seq] is GOOD)


@given(histories(lambda count: st.integers(0, count).map(lambda good: [GOOD] * good + [BAD] * (count - good))))
def test_each_test_halves_what_is_left(history: Naive) -> None:
    history.search()
    assert len(history.tested) <= (history.states[-1] - history.states[0] - 1).bit_length()


@pytest.mark.parametrize("first_bad", [1, 2, 77_777, 99_999, 100_000])
def test_a_hundred_thousand_writes_take_seventeen_tests(first_bad: int) -> None:
    bisection = Bisection(0, 100_000, lambda seq: seq)
    tests = 0
    for seq in iter(bisection.next, None):
        bisection.tell(seq, BAD if seq >= first_bad else GOOD)
        tests += 1
    assert (bisection.good, bisection.bad) == (first_bad - 1, first_bad)
    assert tests <= 17


def test_look_ups_do_not_grow_with_the_history() -> None:
    looked_up = 0

    def newest(seq: int) -> int:
        nonlocal looked_up
        looked_up += 1
        return seq

    bisection = Bisection(0, 1 << 40, newest)
    for seq in iter(bisection.next, None):
        bisection.tell(seq, BAD if seq > 123_456_789 else GOOD)
    assert bisection.good == 123_456_789 and looked_up < 40 * 45


@pytest.mark.parametrize(
    ("states", "told", "order"),
    [
        ([0, 1], {}, []),
        ([0, 1, 2], {1: BAD}, [1]),
        ([0, 900], {}, []),  # snapshots only: there is nothing between
        ([0, 500, 501, 502, 1000], {501: GOOD, 502: BAD}, [501, 502]),
        (range(9), {4: UNKNOWN, 2: GOOD, 6: UNKNOWN, 5: GOOD, 7: BAD}, [4, 2, 6, 3, 5, 7]),
        (range(17), {12: BAD, 2: GOOD, 10: BAD, 6: GOOD, 9: BAD, 7: GOOD}, [8, 4, 12, 2, 6, 10, 7, 9]),
    ],
)
def test_which_state_is_tested_next(states: list[int] | range, told: dict[int, Verdict], order: list[int]) -> None:
    history = Naive(list(states), [GOOD, *(told.get(seq, UNKNOWN) for seq in states[1:-1]), BAD])
    history.search()
    assert history.tested == order


def test_it_gives_up_where_nothing_can_be_told() -> None:
    history = Naive(list(range(1000)), [GOOD, *[UNKNOWN] * 998, BAD])
    found = history.search()
    assert len(history.tested) == MAX_UNKNOWN == len(found.unknown)
    assert max(b - a for a, b in pairwise([0, *found.unknown, 999])) <= 2 * 1000 / MAX_UNKNOWN
