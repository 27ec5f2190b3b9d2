"""The picture of group `granularity`, as SVG: load and rate, the granularity of each interval, and lag, over time.

The middle panel is a map: across goes the time at which one looks, upwards that which one looks at. So a row is an
interval's life: it arrives as a snapshot diff, becomes as fine as the link has room for, and at last every write is
there. The diagonal is now.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from pitfs.model.ladder import RUNGS_NS

WIDTH, LEFT, RIGHT, TOP = 972, 104, 168, 70
GAP = 46
INK, FAINT, GRID, PAPER = "#1f2933", "#66727f", "#e4e8ec", "#ffffff"
LOAD, SENT, LAG, PEAK = "#f2b66d", "#14688f", "#7a4fa3", "#faf1e4"
# Fine to coarse; the last is for snapshots only.
COLOURS = ("#0b6e63", "#2f8f72", "#5aab78", "#8cc47c", "#bcd981", "#e6e58b",
           "#f6d46f", "#f3b255", "#ea8c46", "#dc633f", "#b23a48")  # fmt: skip
FINE_TO_COARSE = (*reversed(RUNGS_NS), None)


@dataclass(frozen=True, slots=True)
class Moment:
    """What was seen at one time.

    Attributes:
        sent_bytes: that had crossed the wire by then.
        lag_s: since the time through which the replica was protected; lag_intervals: closed, not arrived.
        intervals: (from_ns, to_ns, granularity_ns) of each on the replica.
    """

    time_ns: int
    sent_bytes: int
    lag_s: float
    lag_intervals: int
    intervals: tuple[tuple[int, int, int | None], ...]


def rung_name(granularity_ns: int | None) -> str:
    if granularity_ns is None:
        return "snapshots only"
    if granularity_ns == 0:
        return "every write"
    return f"{granularity_ns / 1e9:g} s" if granularity_ns >= 10**9 else f"{granularity_ns / 1e6:g} ms"


class _Panel:
    """A part of the picture with scales of its own; draws into a list of elements."""

    def __init__(self, top: int, height: int, seconds: float, ceiling: float) -> None:
        self.top, self.height, self.seconds, self.ceiling = top, height, seconds, ceiling
        self.right = WIDTH - RIGHT

    @property
    def bottom(self) -> int:
        return self.top + self.height

    def x(self, seconds: float) -> float:
        return round(LEFT + min(max(seconds, 0.0), self.seconds) / self.seconds * (self.right - LEFT), 1)

    def y(self, value: float) -> float:
        return round(self.bottom - min(max(value, 0.0), self.ceiling) / self.ceiling * self.height, 1)

    def frame(self, title: str, ticks: Sequence[tuple[float, str]], peak: Sequence[float]) -> Iterator[str]:
        yield text(LEFT, self.top - 10, title, size=13, weight=600)
        yield box(self.x(peak[0]), self.top, self.x(peak[1]) - self.x(peak[0]), self.height, PEAK)
        for value, label in ticks:
            yield line(LEFT, self.y(value), self.right, self.y(value), GRID)
            yield text(LEFT - 8, self.y(value) + 4, label, FAINT, anchor="end")

    def border(self) -> str:
        return line(LEFT, self.bottom, self.right, self.bottom, INK)


@dataclass(frozen=True, slots=True)
class Picture:
    """
    Attributes:
        moments: what was seen, in order.
        load: (time_ns, bytes per second) of what was written.
        peak: when it began and ended, in seconds after the first moment.
    """

    moments: Sequence[Moment]
    load: Sequence[tuple[int, float]]
    peak: Sequence[float]
    interval_s: float
    link_bytes_per_s: float
    rate_bytes_per_s: float

    def svg(self) -> str:
        seconds = self._at(self.moments[-1].time_ns)
        rates = self._rates()
        top_rate = max([rate for _, rate in rates] + [rate for _, rate in self.load]) / 1e6 * 1.08
        first = _Panel(TOP + 24, 170, seconds, top_rate)
        second = _Panel(first.bottom + GAP, 250, seconds, seconds)
        third = _Panel(second.bottom + GAP, 120, seconds, len(RUNGS_NS) + 0.6)
        lag = max(2.2 * self.interval_s, max(each.lag_s for each in self.moments) * 1.1)
        fourth = _Panel(third.bottom + GAP, 110, seconds, lag)
        height = fourth.bottom + 52
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
            'font-family="system-ui, Helvetica, Arial, sans-serif">',
            "<title>Granularity over a link that carries a fifth of what is written</title>",
            box(0, 0, WIDTH, height, PAPER),
            text(LEFT, 32, "Five times what the link carries, for a while", size=19, weight=700),
            text(LEFT, 54, f"intervals of {self.interval_s:g} s; data that don't compress; granularity falls as far as "
                 "it must, and comes back", FAINT, size=13),
            *self._draw_rates(first, rates),
            *self._draw_map(second),
            *self._draw_coarsest(third),
            *self._draw_lag(fourth),
        ]  # fmt: skip
        for second_ in steps(seconds, 12):
            parts.append(line(fourth.x(second_), fourth.bottom, fourth.x(second_), fourth.bottom + 5, INK))
            parts.append(text(fourth.x(second_), fourth.bottom + 19, f"{second_:g}", FAINT, anchor="middle"))
        parts.append(text(fourth.right, fourth.bottom + 38, "seconds", FAINT, anchor="end"))
        return "\n".join([*parts, "</svg>", ""])

    def _at(self, time_ns: float) -> float:
        return (time_ns - self.moments[0].time_ns) / 1e9

    def _rates(self) -> list[tuple[float, float]]:
        """(seconds, bytes per second on the wire), each over about a second."""
        found, before = [], self.moments[0]
        for moment in self.moments[1:]:
            elapsed = (moment.time_ns - before.time_ns) / 1e9
            if elapsed >= 1:
                middle = self._at((moment.time_ns + before.time_ns) / 2)
                found.append((middle, (moment.sent_bytes - before.sent_bytes) / elapsed))
                before = moment
        return found

    def _draw_rates(self, panel: _Panel, rates: Sequence[tuple[float, float]]) -> Iterator[str]:
        ticks = [(value, f"{value:g}") for value in steps(panel.ceiling, 5)]
        yield from panel.frame("Load and rate on the wire, MB/s", ticks, self.peak)
        points = [(panel.x(0), panel.y(0))]
        last = -1.0
        for time_ns, rate in self.load:
            at = self._at(time_ns)
            if at - last > 1.5:
                points += [(panel.x(last + 1), panel.y(0)), (panel.x(at), panel.y(0))]
            points += [(panel.x(at), panel.y(rate / 1e6)), (panel.x(at + 1), panel.y(rate / 1e6))]
            last = at
        yield polygon([*points, (panel.x(last + 1), panel.y(0))], LOAD)
        yield polyline([(panel.x(at), panel.y(rate / 1e6)) for at, rate in rates], SENT, 2)
        for rate, dash in ((self.link_bytes_per_s, "2 3"), (self.rate_bytes_per_s, "6 3")):
            yield line(LEFT, panel.y(rate / 1e6), panel.right, panel.y(rate / 1e6), FAINT, dash)
        yield from legend(panel, (("written", LOAD), ("on the wire", SENT)))
        yield text(panel.right + 8, panel.y(self.link_bytes_per_s / 1e6) - 3,
                   f"the link: {self.link_bytes_per_s / 1e6:g}", FAINT, size=11)  # fmt: skip
        yield text(panel.right + 8, panel.y(self.rate_bytes_per_s / 1e6) + 11,
                   f"its share for pitfs: {self.rate_bytes_per_s / 1e6:g}", FAINT, size=11)  # fmt: skip
        yield panel.border()

    def _draw_map(self, panel: _Panel) -> Iterator[str]:
        ticks = [(value, f"{value:g}") for value in steps(panel.ceiling, 6)]
        title = "Granularity of each interval (upwards: when it was written, s), as it was seen over time"
        yield from panel.frame(title, ticks, self.peak)
        yield text((panel.x(self.peak[0]) + panel.x(self.peak[1])) / 2, panel.top + 18, "peak", "#8a5a1c",
                   size=12, anchor="middle", weight=600)  # fmt: skip
        for begin, end, from_ns, to_ns, granularity_ns in self._runs():
            x, y = panel.x(self._at(begin)), panel.y(self._at(to_ns))
            tall = panel.y(self._at(from_ns)) - y
            colour = COLOURS[FINE_TO_COARSE.index(granularity_ns)]
            yield box(x, y, round(panel.x(self._at(end)) - x + 0.15, 2), round(max(tall, 0.3), 2), colour)
        yield line(panel.x(0), panel.y(0), panel.right, panel.y(panel.seconds), FAINT, "4 3")
        for index, each in enumerate(FINE_TO_COARSE):
            y = panel.top + 8 + index * 20
            yield box(panel.right + 12, y, 14, 14, COLOURS[index])
            yield text(panel.right + 33, y + 11, rung_name(each), FAINT)
        yield panel.border()

    def _runs(self) -> Iterator[tuple[int, int, int, int, int | None]]:
        """(seen from, seen until, from_ns, to_ns, granularity_ns), as long as nothing changed."""
        open_: dict[tuple[int, int], tuple[int, int | None]] = {}
        for moment in self.moments:
            for from_ns, to_ns, granularity_ns in moment.intervals:
                since = open_.get((from_ns, to_ns))
                if since is None or since[1] != granularity_ns:
                    if since is not None:
                        yield since[0], moment.time_ns, from_ns, to_ns, since[1]
                    open_[from_ns, to_ns] = moment.time_ns, granularity_ns
        for (from_ns, to_ns), (begin, granularity_ns) in open_.items():
            yield begin, self.moments[-1].time_ns, from_ns, to_ns, granularity_ns

    def _draw_coarsest(self, panel: _Panel) -> Iterator[str]:
        shown = (0, 5 * 10**6, 10**8, 10**9, None)
        ticks = [(FINE_TO_COARSE.index(each) + 0.3, rung_name(each)) for each in shown]
        yield from panel.frame("Coarsest and finest granularity on the replica", ticks, self.peak)
        for colour, choose in (("#dc633f", max), ("#0b6e63", min)):
            levels = [
                (self._at(moment.time_ns), choose(FINE_TO_COARSE.index(each[2]) for each in moment.intervals) + 0.3)
                for moment in self.moments
                if moment.intervals
            ]
            yield polyline(stairs([(panel.x(at), panel.y(level)) for at, level in levels]), colour, 2)
        yield from legend(panel, (("coarsest interval", "#dc633f"), ("finest interval", "#0b6e63")))
        yield panel.border()

    def _draw_lag(self, panel: _Panel) -> Iterator[str]:
        ticks = [(value, f"{value:g}") for value in steps(panel.ceiling, 4)]
        yield from panel.frame("Lag of the replica, s", ticks, self.peak)
        for number in (1, 2):
            y = panel.y(number * self.interval_s)
            yield line(LEFT, y, panel.right, y, FAINT, "2 3")
            yield text(panel.right + 8, y + 4, f"{number} interval{'s' * (number > 1)}", FAINT, size=11)
        points = [(panel.x(self._at(each.time_ns)), panel.y(each.lag_s)) for each in self.moments]
        yield polyline(points, LAG, 1.8)
        yield panel.border()


def steps(ceiling: float, count: int) -> list[float]:
    """Round numbers from 0 to the ceiling, at most so many."""
    step = next(
        base * 10**power
        for power in range(-3, 6)
        for base in (1, 2, 5)
        if ceiling / (base * 10**power) <= count
    )
    return [round(index * step, 6) for index in range(math.floor(ceiling / step) + 1)]


def stairs(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The corners of a line that stays until the next point, and only where it changes."""
    corners = [points[0]]
    for x, y in points[1:]:
        if y != corners[-1][1]:
            corners += [(x, corners[-1][1]), (x, y)]
    return [*corners, (points[-1][0], corners[-1][1])]


def legend(panel: _Panel, entries: Sequence[tuple[str, str]]) -> Iterator[str]:
    for index, (name, colour) in enumerate(entries):
        y = panel.top + 8 + index * 20
        yield box(panel.right + 12, y, 14, 14, colour)
        yield text(panel.right + 33, y + 11, name, FAINT)


def text(x: float, y: float, words: str, colour: str = INK, *, size: int = 12, weight: int = 400,
         anchor: str = "start") -> str:  # fmt: skip
    return (
        f'<text x="{x}" y="{y}" fill="{colour}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}">{escape(words, quote=False)}</text>'
    )


def box(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{colour}"/>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str, dash: str = "") -> str:
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}"{dashed}/>'


def polyline(points: Sequence[tuple[float, float]], colour: str, width: float) -> str:
    return (
        f'<polyline points="{_joined(points)}" fill="none" stroke="{colour}" stroke-width="{width}" '
        'stroke-linejoin="round"/>'
    )


def polygon(points: Sequence[tuple[float, float]], colour: str) -> str:
    return f'<polygon points="{_joined(points)}" fill="{colour}"/>'


def _joined(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)
