"""What retention does to a history: its actions. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Thin:
    """An interval's difference journal is brought to a coarser granularity.

    Attributes:
        end_snapshot_id: of the snapshot at the interval's end.
        granularity_ns: a coarser rung; None: the journal goes.
        cause: for the catalog; begins with `model.transfer.PRUNED`.
    """

    end_snapshot_id: int
    granularity_ns: int | None
    cause: str


@dataclass(frozen=True, slots=True)
class Remove:
    """The snapshots strictly between two kept ones go; they become one interval, snapshots only.

    Attributes:
        after_id: None: all snapshots before before_id go, which becomes the first state.
        cause: as that of Thin.
    """

    after_id: int | None
    before_id: int
    cause: str


Action = Thin | Remove
