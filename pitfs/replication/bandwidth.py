"""What the link carries and what the replica takes in, and how much of that is left until the next diff is due.

Two rates are measured of what goes. That of the link counts the time in which something was on its way, until the
replica's TCP had acknowledged it: the kernel knows it, whatever the replica's disk does meanwhile. It says how much
should wait before the socket, and `status` shows it. That of the intake counts all the time until what was sent is
durable. It decides how much is under way, and what goes until the next diff is due: layers that the link carries and
the replica can't write in time would be put off halfway. Where the replica stops reading, as its queue is full, both
are the same: from here a replica that doesn't read looks like a tunnel that carries no more.
"""

from __future__ import annotations

import statistics
from collections import deque
from typing import Final

import trio

from pitfs.model.transfer import MAX_PAYLOAD_BYTES

MEASUREMENTS: Final = 5
LEAST_BUSY_S: Final = 0.01  # the kernel counts in its ticks, of up to that
# What the session has can't be interrupted: on a slow link it must not be more than the link carries in that time.
AHEAD_S: Final = 0.5
MIN_PAYLOAD_BYTES: Final = 64 << 10  # a block at least


class Bandwidth:
    """Of one group's link.

    Args:
        configured_rate: bytes per second on the wire, None where there is no cap.

    Attributes:
        next_diff_at: trio's clock, when the next interval is closed.
        rates: the last measured ones of the link; intakes: of the intake; in bytes of payload per second.
        wire_ratio: bytes on the wire for each byte of payload, of the last transfer that was measurable.
    """

    def __init__(self, configured_rate: int | None) -> None:
        self._configured_rate = configured_rate
        self.next_diff_at = 0.0
        self.rates: deque[float] = deque(maxlen=MEASUREMENTS)
        self.intakes: deque[float] = deque(maxlen=MEASUREMENTS)
        self.wire_ratio = 1.0

    def measured(self, payload_bytes: int, busy_s: float, elapsed_s: float) -> None:
        """So much became durable on the replica in that time, in which the link was busy for `busy_s`."""
        self.rates.append(payload_bytes / max(busy_s, LEAST_BUSY_S))
        self.intakes.append(payload_bytes / max(elapsed_s, 1e-3))

    @property
    def rate(self) -> float | None:
        """What the link carries: on the wire as configured, or payload as measured, per second; None before that."""
        if self._configured_rate is not None:
            return self._configured_rate
        return statistics.median(self.rates) if self.rates else None

    @property
    def intake(self) -> float | None:
        """Payload that becomes durable on the replica per second, as configured or measured; None before that."""
        if self._configured_rate is not None:
            return self._configured_rate / self.wire_ratio
        return statistics.median(self.intakes) if self.intakes else None

    def room_bytes(self) -> float | None:
        """What goes, in payload, until the next diff is due; None where no rate is known."""
        intake = self.intake
        left_s = max(0.0, self.next_diff_at - trio.current_time())
        return None if intake is None else intake * left_s

    def carries(self, size_bytes: int, time_ns: int) -> bool:
        """Whether so much payload goes in that time, as far as a rate is known."""
        intake = self.intake
        return intake is None or size_bytes <= intake * time_ns / 1e9

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
