"""What goes next, as a table."""

from __future__ import annotations

import pytest

from pitfs.model.ladder import LAST_LAYER, NO_LAYER, RUNGS_NS
from pitfs.model.schedule import Decision, Step, StepKind, Waiting, layers_left, next_step

MB = 1_000_000
# No position on the first two rungs; 1 s takes 2 MB, 500 ms 3 MB, …, every write 20 MB.
RUNG_BYTES = (None, None, 2 * MB, 3 * MB, 5 * MB, 7 * MB, 9 * MB, 10 * MB, 12 * MB, 20 * MB)
assert len(RUNG_BYTES) == len(RUNGS_NS)


def waiting(layer: int = NO_LAYER, parked: int | None = None, mark: int = 7) -> Waiting:
    return Waiting(mark, layer, RUNG_BYTES, parked)


@pytest.mark.parametrize(
    ("diff_due", "journals", "room_bytes", "kind", "mark", "layer"),
    [
        (True, [waiting()], 100 * MB, StepKind.DIFF, 0, NO_LAYER),
        (True, [], None, StepKind.DIFF, 0, NO_LAYER),
        (False, [], 100 * MB, StepKind.WAIT, 0, NO_LAYER),
        (False, [Waiting(7, NO_LAYER, None)], 100 * MB, StepKind.BUILD, 7, NO_LAYER),
        (False, [waiting()], 100 * MB, StepKind.LAYERS, 7, LAST_LAYER),
        (False, [waiting()], None, StepKind.LAYERS, 7, LAST_LAYER),
        (False, [waiting()], 20 * MB, StepKind.LAYERS, 7, LAST_LAYER),
        (False, [waiting()], 20 * MB - 1, StepKind.LAYERS, 7, 8),
        (False, [waiting()], 5 * MB, StepKind.LAYERS, 7, 4),
        (False, [waiting()], 2 * MB, StepKind.LAYERS, 7, 2),
        (False, [waiting()], 2 * MB - 1, StepKind.LAYERS, 7, 2),  # the link is idle: as far as it gets
        (False, [waiting()], 0, StepKind.LAYERS, 7, 2),
        (False, [waiting(4)], 2 * MB, StepKind.LAYERS, 7, 5),  # 7 - 5 MB
        (False, [waiting(4)], 15 * MB, StepKind.LAYERS, 7, LAST_LAYER),
        (False, [waiting(8)], 0, StepKind.LAYERS, 7, LAST_LAYER),
        (False, [waiting(parked=6)], 100 * MB, StepKind.LAYERS, 7, 6),  # what came of it isn't sent again
        (False, [waiting(mark=8), waiting(mark=7)], 100 * MB, StepKind.LAYERS, 8, LAST_LAYER),
        (False, [waiting(mark=8), waiting(mark=7, parked=2)], 0, StepKind.LAYERS, 8, 2),
    ],
)
def test_what_goes_next(
    diff_due: bool, journals: list[Waiting], room_bytes: float | None, kind: StepKind, mark: int, layer: int
) -> None:
    step = next_step(diff_due=diff_due, waiting=journals, room_bytes=room_bytes)
    assert (step.kind, step.seq, step.layer) == (kind, mark, layer)
    assert step.decision.reason or step.kind is not StepKind.LAYERS


def test_a_reason_says_what_fits() -> None:
    assert next_step(diff_due=False, waiting=[waiting()], room_bytes=6 * MB) == Step(
        StepKind.LAYERS, 7, Decision(RUNGS_NS[4], "5 MB of it fit: difference journal 20 MB, room 6 MB")
    )


def test_a_layer_that_adds_nothing_is_passed_over_but_never_the_last() -> None:
    sizes = (None, None, 2, 2, 5, 5, 5, 5, 5, 5)
    assert layers_left(2, sizes) == [(4, 3), (5, 3), (6, 3), (7, 3), (8, 3), (9, 3)]
    assert layers_left(4, sizes) == [(9, 0)]
    assert layers_left(LAST_LAYER, sizes) == []
    with pytest.raises(ValueError, match="nothing is left"):
        next_step(diff_due=False, waiting=[Waiting(7, LAST_LAYER, sizes)], room_bytes=1)
