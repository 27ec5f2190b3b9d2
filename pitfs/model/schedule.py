"""What goes to the replica next: a stream or intervals, and of an interval which granularity (figure 7). Pure.

The newest interval's snapshot diff goes before anything else. Then the layers of its difference journal, then those
of intervals before it, newest first, for as long as no diff is due: a diff interrupts a transfer of layers, which is
parked, and resumed later with what the replica has of it.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pitfs.model.ladder import NO_LAYER, RUNGS_NS, layer_of
from pitfs.model.units import format_bytes

MIN_BEHIND_S: Final = 1.0  # a stream that is less behind than this keeps up
MAX_BACKLOG_S: Final = 1.0  # of the link's rate: a stream that begins catches up within that
UNKNOWN_BACKLOG_BYTES: Final = 16 << 20  # the same while the rate isn't known
MAX_INTERVAL_ROWS: Final = 1 << 19  # blocks written: building the difference takes some 240 B of RAM for each
MAX_INTERVAL_PART: Final = 4  # of the journal's capacity: the largest part that an interval may take
EVERY_WRITE: Final = 0


@dataclass(frozen=True, slots=True)
class ShippingMode:
    """How writes go: as a stream as they come, or by intervals; `reason`: in words, for people."""

    streams: bool
    reason: str


def choose_shipping_mode(
    *,
    mode: str,
    streaming: bool,
    behind_s: float,
    backlog_bytes: int,
    interval_s: float,
    rate_bytes_per_s: float | None,
    fitted: bool,
) -> ShippingMode:
    """The table:

        mode snapshot                                       intervals
        mode async or sync                                  stream
        dynamic, streaming, behind a quarter of an interval intervals
        dynamic, streaming                                  stream
        dynamic, the last interval didn't fit as a whole    intervals
        dynamic, more waits than goes in a second           intervals
        dynamic                                             stream

    Args:
        streaming: whether it streams now. behind_s: for how long the replica has lacked its oldest missing write.
        backlog_bytes: of the local journal, that would be streamed first.
        fitted: whether the link could have carried every write of the last interval in the interval's time.
    """
    if mode == "snapshot":
        return ShippingMode(False, "mode is snapshot")
    if mode in ("async", "sync"):
        return ShippingMode(True, f"mode is {mode}")
    if streaming:
        if behind_s > behind_limit_s(interval_s):
            return ShippingMode(False, f"intervals: as a stream the replica was {behind_s:.1f} s behind")
        return ShippingMode(True, "the link keeps up")
    if not fitted:
        return ShippingMode(False, "intervals: every write of the last one was more than goes in its time")
    room = UNKNOWN_BACKLOG_BYTES if rate_bytes_per_s is None else rate_bytes_per_s * MAX_BACKLOG_S
    if backlog_bytes > room:
        return ShippingMode(
            False, f"intervals: {format_bytes(backlog_bytes)} wait, {format_bytes(room)} go in a second"
        )
    return ShippingMode(True, "the link keeps up")


def behind_limit_s(interval_s: float) -> float:
    """How far the replica may be behind in mode dynamic before intervals go instead."""
    return max(MIN_BEHIND_S, interval_s / 4)


@dataclass(frozen=True, slots=True)
class Decision:
    """What of an interval goes. granularity_ns: a rung, 0 every write, None snapshots only. reason: for people."""

    granularity_ns: int | None
    reason: str


class StepKind(enum.Enum):
    DIFF = "diff"
    BUILD = "build"  # the newest journal's layers have to be known first
    LAYERS = "layers"
    WAIT = "wait"


@dataclass(frozen=True, slots=True)
class Waiting:
    """A difference journal that isn't whole on the replica.

    Attributes:
        seq: of the last write of the interval.
        layer: the last one that the replica has.
        rung_bytes: of each rung what it takes with those before, None where it adds nothing; None: not built yet.
        parked: the layer up to which a transfer was parked, None if there is none.
    """

    seq: int
    layer: int
    rung_bytes: tuple[int | None, ...] | None
    parked: int | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """What to do.

    Attributes:
        seq: BUILD, LAYERS: of the journal.
        decision: LAYERS: what the replica has of the interval afterwards, and why no more.
        fits: whether it is expected to arrive before the next diff is due.
    """

    kind: StepKind
    seq: int = 0
    decision: Decision = Decision(None, "")
    fits: bool = True

    @property
    def layer(self) -> int:
        """The last one to send."""
        return layer_of(self.decision.granularity_ns)


def next_step(*, diff_due: bool, waiting: Sequence[Waiting], room_bytes: float | None) -> Step:
    """Figure 7, block 728, by layers: what fits into `rate × interval − diff` goes. The table:

        a diff is due                          it
        no journal waits                       wait
        the newest isn't built                 build it
        a transfer of it is parked             resume that one
        no rate is known                       every write
        some of its layers fit                 up to the finest of these
        none fits until the next diff is due   the next one: the link is idle, and a diff can interrupt it

    Args:
        waiting: newest interval first.
        room_bytes: what the link carries behind the last diff until the next is due; None where its rate isn't known.
    """
    if diff_due:
        return Step(StepKind.DIFF)
    if not waiting:
        return Step(StepKind.WAIT)
    newest = waiting[0]
    if newest.rung_bytes is None:
        return Step(StepKind.BUILD, newest.seq)
    left = layers_left(newest.layer, newest.rung_bytes)
    if not left:
        raise ValueError(f"nothing is left of the journal to seq {newest.seq}")

    def layers(layer: int, reason: str, fits: bool = True) -> Step:
        return Step(StepKind.LAYERS, newest.seq, Decision(RUNGS_NS[layer], reason), fits)

    if newest.parked is not None:
        return layers(newest.parked, "resumed: a snapshot diff interrupted it")
    last, whole_bytes = left[-1]
    if room_bytes is None:
        return layers(last, "no rate is configured or measured yet: everything is sent")
    figures = f"difference journal {format_bytes(whole_bytes)}, room {format_bytes(room_bytes)}"
    if whole_bytes <= room_bytes:
        return layers(last, f"fits: {figures}")
    for layer, size_bytes in reversed(left):
        if size_bytes <= room_bytes:
            return layers(layer, f"{format_bytes(size_bytes)} of it fit: {figures}")
    return layers(left[0][0], f"doesn't fit: {figures}: sent while the link is idle", fits=False)


def layers_left(layer: int, rung_bytes: Sequence[int | None]) -> list[tuple[int, int]]:
    """The layers after `layer` that add something, and what each takes with those before it, coarse to fine."""
    base = (rung_bytes[layer] or 0) if layer > NO_LAYER else 0
    return [
        (each, size - base)
        for each, size in list(enumerate(rung_bytes))[layer + 1 :]
        if size is not None and (layer == NO_LAYER or each == len(RUNGS_NS) - 1 or size > base)
    ]
