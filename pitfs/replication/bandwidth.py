"""What the link carries, as configured or measured, and how much of that is left until the next diff is due."""

from __future__ import annotations

import statistics
from collections import deque
from typing import Final

import trio

from pitfs.model.transfer import MAX_PAYLOAD_BYTES

MEASUREMENTS: Final = 5
# What the session has can't be interrupted: on a slow link it must not be more than the link carries in that time.
AHEAD_S: Final = 0.5
MIN_PAYLOAD_BYTES: Final = 64 << 10  # a block at least


class Bandwidth:
    """Of one group's link.

    Args:
        configured_rate: bytes per second on the wire, None where there is no cap.

    Attributes:
        next_diff_at: trio's clock, when the next interval is closed.
        rates: the last measured ones, in bytes of payload per second that the replica acknowledged.
        wire_ratio: bytes on the wire for each byte of payload, of the last transfer that was measurable.
    """

    def __init__(self, configured_rate: int | None) -> None:
        self._configured_rate = configured_rate
        self.next_diff_at = 0.0
        self.rates: deque[float] = deque(maxlen=MEASUREMENTS)
        self.wire_ratio = 1.0

    @property
    def rate(self) -> float | None:
        """Bytes per second: on the wire as configured, or of payload as measured; None before that."""
        if self._configured_rate is not None:
            return self._configured_rate
        return statistics.median(self.rates) if self.rates else None

    @property
    def _ratio(self) -> float:
        """What the rate counts for each byte of payload."""
        return 1.0 if self._configured_rate is None else self.wire_ratio

    def room_bytes(self) -> float | None:
        """What the link carries, in payload, until the next diff is due; None where its rate isn't known."""
        rate = self.rate
        left_s = max(0.0, self.next_diff_at - trio.current_time())
        return None if rate is None else rate / self._ratio * left_s

    def carries(self, size_bytes: int, time_ns: int) -> bool:
        """Whether so much payload goes in that time, as far as the rate is known."""
        rate = self.rate
        return rate is None or size_bytes * self._ratio <= rate * time_ns / 1e9

    @property
    def payload_bytes(self) -> int:
        """How long frames may be."""
        rate = self.rate
        if rate is None:
            return MAX_PAYLOAD_BYTES
        return int(min(max(rate * AHEAD_S / 4, MIN_PAYLOAD_BYTES), MAX_PAYLOAD_BYTES))

    @property
    def queue_bytes(self) -> int:
        """What may wait before compression, and as much behind it: with what is in between all of AHEAD_S."""
        return self.payload_bytes * (4 if self.rate is None else 1)
