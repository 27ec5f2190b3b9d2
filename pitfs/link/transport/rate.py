"""Token bucket: holds a rate. Pure; the caller brings the clock and sleeps (as nbdkit's rate filter does)."""

from __future__ import annotations

from typing import Final

ROUNDING_BYTES: Final = 1e-3  # by which floating point may miss the tokens that a caller waited for


class TokenBucket:
    """Lets `rate_bytes_per_s` through, with bursts of at most `burst_bytes`.

    In any t seconds at most rate × t + burst bytes go through. Tokens are taken when the bytes really go: a caller
    that woke late can't send what it waited for late and the next part on time. If it asks for less than a burst at
    once it gets the whole rate all the same, since the rest of the bucket fills while it sleeps too long.
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
            0 if they were taken; else nothing was taken, and there are enough tokens after so many seconds.
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
