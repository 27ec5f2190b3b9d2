"""Token bucket: holds a rate. Pure; the caller brings the clock and sleeps (as nbdkit's rate filter does)."""

from __future__ import annotations

from typing import Final

ROUNDING_BYTES: Final = 1e-3  # what floating point may be short of a token that was waited for


class TokenBucket:
    """Lets `rate_bytes_per_s` through, with bursts of at most `burst_bytes`.

    In any interval of t seconds at most rate × t + burst bytes go through: tokens are taken when the bytes
    really go, so a caller that woke late can't send late what it waited for and the next at its time. It gets
    the whole rate all the same if it asks for less than a burst at once: the rest of the bucket fills
    meanwhile, and what was slept too long, up to that rest, isn't lost.
    """

    def __init__(self, rate_bytes_per_s: float, burst_bytes: int, now_s: float) -> None:
        if rate_bytes_per_s <= 0 or burst_bytes <= 0:
            raise ValueError("rate and burst are positive")
        self.rate_bytes_per_s = rate_bytes_per_s
        self.burst_bytes = burst_bytes
        self._level_bytes = float(burst_bytes)
        self._time_s = now_s

    def take(self, count_bytes: int, now_s: float) -> float:
        """Takes `count_bytes` (at most the burst) if they may be sent now.

        Args:
            now_s: monotonic seconds; going back counts as standing still.

        Returns:
            0 if they were taken; else nothing was taken, and it is worth asking again after so many seconds.
        """
        if not 0 <= count_bytes <= self.burst_bytes:
            raise ValueError(f"{count_bytes} bytes at once, burst is {self.burst_bytes}")
        if now_s > self._time_s:
            earned = (now_s - self._time_s) * self.rate_bytes_per_s
            self._level_bytes = min(float(self.burst_bytes), self._level_bytes + earned)
            self._time_s = now_s
        missing = count_bytes - self._level_bytes
        if missing > ROUNDING_BYTES:
            return missing / self.rate_bytes_per_s
        self._level_bytes = max(0.0, -missing)
        return 0.0
