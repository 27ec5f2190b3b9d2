"""The decision of figure 7: whether the difference journal goes to the replica or is erased. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

EVERY_WRITE: Final = 0
SNAPSHOTS_ONLY: Final = None


@dataclass(frozen=True, slots=True)
class Decision:
    """granularity_ns: 0 every write, None snapshots only. reason: in words, for people."""

    granularity_ns: int | None
    reason: str


def decide(
    *,
    mode: str,
    diff_bytes: int,
    journal_bytes: int,
    interval_ns: int,
    rate_bytes_per_s: float | None,
) -> Decision:
    """Figure 7, block 728: the journal goes whole if it fits into `rate × interval − diff`, else not at all.

    Args:
        mode: "dynamic" or "snapshot".
        diff_bytes, journal_bytes: what each is expected to take on the link.
        interval_ns: the configured interval.
        rate_bytes_per_s: of the link; None while neither configured nor measured: then everything goes.
    """
    if mode == "snapshot":
        return Decision(SNAPSHOTS_ONLY, "mode is snapshot")
    if rate_bytes_per_s is None:
        return Decision(EVERY_WRITE, "no rate is configured or measured yet: everything is sent")
    room = rate_bytes_per_s * interval_ns / 1e9 - diff_bytes
    figures = (
        f"difference journal {_megabytes(journal_bytes)} MB, room {_megabytes(max(room, 0))} MB "
        f"({_megabytes(rate_bytes_per_s)} MB/s for {interval_ns / 1e9:g} s, snapshot diff {_megabytes(diff_bytes)} MB)"
    )
    if journal_bytes <= room:
        return Decision(EVERY_WRITE, f"fits: {figures}")
    return Decision(SNAPSHOTS_ONLY, f"doesn't fit: {figures}")


def _megabytes(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:.1f}"
