"""What the link carries, as configured or measured, and what of an interval fits into that (figure 7)."""

from __future__ import annotations

import trio

from pitfs.config.production import ReplicationConfig
from pitfs.model.granularity import Decision, decide
from pitfs.replication.shipment import Shipment
from pitfs.replication.status import ReplicationStatus


class Budget:
    """Of one group.

    Attributes:
        tick_at: trio's clock, when the next interval is closed.
    """

    def __init__(self, replication: ReplicationConfig, standing: ReplicationStatus) -> None:
        self._replication, self._standing = replication, standing
        self.tick_at = 0.0

    @property
    def rate(self) -> float | None:
        """Bytes per second: on the wire as configured, or of payload as measured; None before that."""
        configured = self._replication.rate_bytes_per_s
        return configured if configured is not None else self._standing.measured_rate

    @property
    def _ratio(self) -> float:
        """What the rate counts for each byte of payload."""
        return 1.0 if self._replication.rate_bytes_per_s is None else self._standing.wire_ratio

    def room_bytes(self) -> float | None:
        """What the link carries, in payload, until the next diff is due; None where its rate isn't known."""
        rate = self.rate
        return None if rate is None else rate / self._ratio * max(0.0, self.tick_at - trio.current_time())

    def decide(self, prepared: Shipment, early: bool) -> Decision:
        """What of an interval's difference journal is going to fit.

        Args:
            early: it was closed before its time.
        """
        replication, standing, interval = self._replication, self._standing, prepared.interval
        # An interval that became longer, since nothing was shipped for a while, had as much more time.
        before = standing.committed.protected_through_ns if standing.committed else interval.mark_time_ns
        # One that was closed early has its own time only: else each of the parts had the whole interval's room.
        least_ns = 0 if early else replication.interval_ns
        return decide(
            mode=replication.mode,
            diff_bytes=int(prepared.diff_bytes * self._ratio),
            journal_bytes=[None if size is None else int(size * self._ratio) for size in prepared.rung_bytes],
            interval_ns=max(least_ns, interval.mark_time_ns - before),
            rate_bytes_per_s=self.rate,
        )
