"""Which state of a history to test next: the newest good and the oldest bad one come together by halves.

States are named by seq. A history isn't listed: `newest` answers which reachable state is the newest not after a seq,
and finds the first and last state between two others by a binary search of its own. Those cost look-ups, not tests.

    good . . . . first . . . . middle . . . . last . . . bad      each test halves first to last, or tells nothing

A state of which nothing can be told parts the stretch in two; the wider part is halved next. So a run of such states
in the middle is left by widening steps. Pure.
"""

from __future__ import annotations

import enum
from bisect import bisect_left, insort
from collections.abc import Callable
from itertools import pairwise
from typing import Final

MAX_UNKNOWN: Final = 64  # tests in a row that told nothing: by then those left are all of that kind, or nearly so


class Verdict(enum.Enum):
    """What a test says of a state."""

    GOOD = "good"
    BAD = "bad"
    UNKNOWN = "can't tell"


class Bisection:
    """Finds a good state and a bad one behind it with nothing but untold states between.

    Args:
        good, bad: seqs of two such states, the good one earlier.
        newest: the seq of the newest reachable state not after this one.

    Attributes:
        good, bad: the newest known to be good, the oldest known to be bad behind it.
        unknown: tested states between them of which nothing could be told, ascending.
    """

    def __init__(self, good: int, bad: int, newest: Callable[[int], int]) -> None:
        self.good, self.bad = good, bad
        self.unknown: list[int] = []
        self._newest = newest
        self._in_a_row = 0

    def next(self) -> int | None:
        """The state to test next; None where no test can bring the two closer, or `MAX_UNKNOWN` in a row haven't."""
        parts = pairwise([self.good, *self.unknown, self.bad])
        for start, end in sorted(parts, key=lambda part: part[0] - part[1]) if self._in_a_row < MAX_UNKNOWN else ():
            last = self._newest(end - 1)
            if last > start:
                seqs = range(start + 1, last + 1)
                first = seqs[bisect_left(seqs, True, key=lambda seq: self._newest(seq) > start)]
                return self._newest((first + last) // 2)
        return None

    def tell(self, seq: int, verdict: Verdict) -> None:
        """Takes what the test of the state that `next` gave has said."""
        self._in_a_row = self._in_a_row + 1 if verdict is Verdict.UNKNOWN else 0
        if verdict is Verdict.UNKNOWN:
            insort(self.unknown, seq)
        elif verdict is Verdict.GOOD:
            self.good = seq
        else:
            self.bad = seq
        self.unknown = [each for each in self.unknown if self.good < each < self.bad]
