"""What goes to the replica next. Pure.

The newest interval's snapshot diff goes before anything else. Then the layers of its difference journal, then those
of intervals before it, newest first, for as long as no diff is due: a layer that is interrupted by one is put off, and
what came of it counts.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pitfs.model.granularity import megabytes
from pitfs.model.ladder import NO_LAYER, RUNGS_NS

MIN_BEHIND_S: Final = 1.0  # a stream that is less behind than this keeps up
MAX_BACKLOG_S: Final = 1.0  # of the link's rate: a stream that begins catches up within that
UNKNOWN_BACKLOG_BYTES: Final = 16 << 20  # the same while the rate isn't known


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
        fitted: whether every write of the last interval that went as such fitted into the link's rate.
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
        return ShippingMode(False, "intervals: every write of the last one took more than the link carries")
    room = UNKNOWN_BACKLOG_BYTES if rate_bytes_per_s is None else rate_bytes_per_s * MAX_BACKLOG_S
    if backlog_bytes > room:
        return ShippingMode(
            False, f"intervals: {megabytes(backlog_bytes)} MB wait, {megabytes(room)} MB go in a second"
        )
    return ShippingMode(True, "the link keeps up")


def behind_limit_s(interval_s: float) -> float:
    """How far the replica may be behind in mode dynamic before intervals go instead."""
    return max(MIN_BEHIND_S, interval_s / 4)


class StepKind(enum.Enum):
    DIFF = "diff"
    BUILD = "build"  # the newest journal's layers have to be known first
    LAYERS = "layers"
    WAIT = "wait"


@dataclass(frozen=True, slots=True)
class Waiting:
    """A difference journal that isn't whole on the replica.

    Attributes:
        mark: of the interval's end.
        layer: the last one that the replica has.
        rung_bytes: of each rung what it takes with those before, None where it adds nothing; None: not built yet.
        parked: the layer up to which a transfer was put off, None if there is none.
    """

    mark: int
    layer: int
    rung_bytes: tuple[int | None, ...] | None
    parked: int | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """What to do; `layer`: the last to send; `reason`: in words, for people."""

    kind: StepKind
    mark: int = 0
    layer: int = NO_LAYER
    reason: str = ""


def next_step(*, diff_due: bool, waiting: Sequence[Waiting], room_bytes: float | None) -> Step:
    """The table:

        a diff is due                          it
        no journal waits                       wait
        the newest isn't built                 build it
        it was put off within a layer          go on with that
        some of its layers fit                 up to the finest of these
        none fits until the next diff is due   the next one: the link is idle, and it can be put off

    Args:
        waiting: newest interval first.
        room_bytes: what the link carries until the next diff is due; None where its rate isn't known.
    """
    if diff_due:
        return Step(StepKind.DIFF, reason="a snapshot diff goes before anything else")
    if not waiting:
        return Step(StepKind.WAIT, reason="all that was written is on the replica")
    newest = waiting[0]
    if newest.rung_bytes is None:
        return Step(StepKind.BUILD, newest.mark)
    left = layers_left(newest.layer, newest.rung_bytes)
    if not left:
        raise ValueError(f"nothing is left of the journal to mark {newest.mark}")
    if newest.parked is not None:
        return Step(StepKind.LAYERS, newest.mark, newest.parked, "going on where a diff came first")
    if room_bytes is None:
        last, _ = left[-1]
        return Step(StepKind.LAYERS, newest.mark, last, "no rate is configured or measured yet: everything is sent")
    fitting = [(layer, size) for layer, size in left if size <= room_bytes]
    if fitting:
        layer, size = fitting[-1]
        return Step(
            StepKind.LAYERS, newest.mark, layer, f"{megabytes(size)} MB fit into {megabytes(room_bytes)} MB of room"
        )
    layer, size = left[0]
    return Step(StepKind.LAYERS, newest.mark, layer, f"the link is idle: {megabytes(size)} MB as far as they get")


def layers_left(layer: int, rung_bytes: Sequence[int | None]) -> list[tuple[int, int]]:
    """The layers after `layer` that add something, and what each takes with those before it, coarse to fine."""
    base = (rung_bytes[layer] or 0) if layer > NO_LAYER else 0
    return [
        (each, size - base)
        for each, size in list(enumerate(rung_bytes))[layer + 1 :]
        if size is not None and (layer == NO_LAYER or each == len(RUNGS_NS) - 1 or size > base)
    ]
