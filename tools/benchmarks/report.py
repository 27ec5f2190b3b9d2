"""What a benchmark says: rows of figures, as a table and as the JSON of the contract."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Measure:
    """One figure.

    Attributes:
        against: what it is compared with, empty if with nothing.
        ratio: value / the other's value; None where there is no other.
        goal: what `ratio` (or, without a ratio, `value`) must reach; None if there is none.
        met: None without a goal.
    """

    measure: str
    value: float
    unit: str
    against: str = ""
    ratio: float | None = None
    goal: float | None = None
    met: bool | None = None


def compare(measure: str, values: Sequence[float], others: Sequence[float], unit: str, goal: float | None,
            against: str = "bare pyfuse3 passthrough") -> Measure:  # fmt: skip
    """Medians, more is better; the ratio is the median of the rounds' own, since machines drift."""
    value, other = statistics.median(values), statistics.median(others)
    ratio = round(statistics.median(one / two for one, two in zip(values, others, strict=True)), 3)
    name = f"{against}: {figure(other)} {unit}"
    return Measure(measure, round(value, 1), unit, name, ratio, goal, None if goal is None else ratio >= goal)


def at_most(measure: str, value: float, unit: str, goal: float) -> Measure:
    return Measure(measure, round(value, 2), unit, "goal: at most", None, goal, value <= goal)


def plain(measure: str, value: float, unit: str) -> Measure:
    return Measure(measure, round(value, 2), unit)


def figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.2f}"


def show(measures: Sequence[Measure]) -> None:
    """A table on standard output, as reStructuredText has them: it can be pasted."""
    heads = ("measure", "value", "against", "ratio", "goal", "met")
    rows = [
        (m.measure, f"{figure(m.value)} {m.unit}", m.against, "" if m.ratio is None else f"{m.ratio:.3f}",
         "" if m.goal is None else f"{m.goal:g}", {None: "", True: "yes", False: "NO"}[m.met])
        for m in measures
    ]  # fmt: skip
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    line = tuple("=" * width for width in widths)
    for row in [line, heads, line, *rows, line]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def write_json(measures: Sequence[Measure], path: Path) -> None:
    path.write_text(json.dumps([asdict(m) for m in measures], indent=1) + "\n")


def note(text: str) -> None:
    """What is being done, for who waits; never among the figures."""
    print(text, file=sys.stderr, flush=True)
