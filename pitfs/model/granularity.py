"""The decision of figure 7: how much of the difference journal goes to the replica. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pitfs.model.ladder import RUNGS_NS

EVERY_WRITE: Final = 0
SNAPSHOTS_ONLY: Final = None


@dataclass(frozen=True, slots=True)
class Decision:
    """granularity_ns: a rung, 0 every write, None snapshots only. reason: in words, for people."""

    granularity_ns: int | None
    reason: str


def decide(
    *,
    mode: str,
    diff_bytes: int,
    journal_bytes: Sequence[int | None],
    interval_ns: int,
    rate_bytes_per_s: float | None,
) -> Decision:
    """Figure 7, block 728, by rungs: of the difference journal goes what fits into `rate × interval − diff`.

    Args:
        mode: "dynamic" or "snapshot".
        diff_bytes: what the snapshot diff is expected to take on the link.
        journal_bytes: what the difference journal is, on each rung; None where the rung has no instant inside.
        interval_ns: the interval's time.
        rate_bytes_per_s: of the link; None while neither configured nor measured: then everything goes.
    """
    if mode == "snapshot":
        return Decision(SNAPSHOTS_ONLY, "mode is snapshot")
    if rate_bytes_per_s is None:
        return Decision(EVERY_WRITE, "no rate is configured or measured yet: everything is sent")
    room = rate_bytes_per_s * interval_ns / 1e9 - diff_bytes
    whole = journal_bytes[-1] or 0
    figures = (
        f"difference journal {megabytes(whole)} MB, room {megabytes(max(room, 0))} MB "
        f"({megabytes(rate_bytes_per_s)} MB/s for {interval_ns / 1e9:g} s, snapshot diff {megabytes(diff_bytes)} MB)"
    )
    if whole <= room:
        return Decision(EVERY_WRITE, f"fits: {figures}")
    for rung_ns, size_bytes in reversed(list(zip(RUNGS_NS, journal_bytes, strict=True))):
        if size_bytes is not None and size_bytes <= room:
            return Decision(rung_ns, f"{megabytes(size_bytes)} MB of it fit: {figures}")
    return Decision(SNAPSHOTS_ONLY, f"doesn't fit: {figures}")


def megabytes(size_bytes: float) -> str:
    """For messages."""
    return f"{size_bytes / 1e6:.1f}"
