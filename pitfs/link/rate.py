"""Token bucket: holds a rate. Pure; the caller brings the clock and sleeps (as nbdkit's rate filter does)."""

from __future__ import annotations


class TokenBucket:
    """Lets `rate_bytes_per_s` through, with bursts of at most `burst_bytes`.

    Bytes taken are owed at once and the caller is told how long to sleep before it sends them. So in any
    interval of t seconds at most rate × t + burst bytes are let through, and a sender that always has
    something to send gets the whole rate: what was slept too long is made up for, up to the burst.
    """

    def __init__(self, rate_bytes_per_s: float, burst_bytes: int, now_s: float) -> None:
        if rate_bytes_per_s <= 0 or burst_bytes <= 0:
            raise ValueError("rate and burst are positive")
        self.rate_bytes_per_s = rate_bytes_per_s
        self.burst_bytes = burst_bytes
        self._level_bytes = float(burst_bytes)  # negative: owed
        self._time_s = now_s

    def take(self, count_bytes: int, now_s: float) -> float:
        """Takes `count_bytes` (at most the burst) and returns the seconds to sleep before they are sent.

        Args:
            now_s: monotonic seconds; going back counts as standing still.
        """
        if not 0 <= count_bytes <= self.burst_bytes:
            raise ValueError(f"{count_bytes} bytes at once, burst is {self.burst_bytes}")
        if now_s > self._time_s:
            earned = (now_s - self._time_s) * self.rate_bytes_per_s
            self._level_bytes = min(float(self.burst_bytes), self._level_bytes + earned)
            self._time_s = now_s
        self._level_bytes -= count_bytes
        return max(0.0, -self._level_bytes / self.rate_bytes_per_s)
