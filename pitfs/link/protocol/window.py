"""How far back the codec's stream may refer: limits, what the two sides agree on, and what a replica can spend."""

from __future__ import annotations

from typing import Final

MIN_WINDOW_BYTES: Final = 1 << 20  # less than a payload would help nothing
MAX_WINDOW_BYTES: Final = 128 << 20  # memory of each side; beyond it, traces of databases gained a tenth
DEFAULT_WINDOW_BYTES: Final = 32 << 20
SPARE_BYTES: Final = 64 << 20  # for the windows beside one of full size
SHARE: Final = 4  # a connection gets this part of what is left: others will come


def check_window(window_bytes: int) -> None:
    """
    Raises:
        ValueError: it isn't a size that a window can have.
    """
    power = window_bytes > 0 and window_bytes & (window_bytes - 1) == 0
    if not power or not MIN_WINDOW_BYTES <= window_bytes <= MAX_WINDOW_BYTES:
        low, high = MIN_WINDOW_BYTES >> 20, MAX_WINDOW_BYTES >> 20
        raise ValueError(f"window {window_bytes}: must be a power of two from {low}MiB to {high}MiB")


class WindowPool:
    """What the connections of one replica may hold of windows, all together: `limit_bytes` and some beside it.

    A decoder holds as much memory as its window is large, so ten groups can't all have the largest. Whoever is alone
    gets what it wants; those beside it get a share of what is left then, and never less than the smallest.
    Each keeps what it has got.
    """

    def __init__(self, limit_bytes: int) -> None:
        check_window(limit_bytes)
        self.limit_bytes = limit_bytes
        self.taken_bytes = 0

    def take(self, offered_bytes: int) -> int:
        """The window for one more connection, whose sender offers this; to be given back."""
        wanted = min(offered_bytes, self.limit_bytes)
        if self.taken_bytes + wanted > self.limit_bytes:
            share = max(self.limit_bytes + SPARE_BYTES - self.taken_bytes, 0) // SHARE
            wanted = min(wanted, max(1 << share.bit_length() >> 1, MIN_WINDOW_BYTES))
        self.taken_bytes += wanted
        return wanted

    def give_back(self, window_bytes: int) -> None:
        self.taken_bytes -= window_bytes
