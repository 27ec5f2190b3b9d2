"""How much memory the windows of a replica's connections may take, all together."""

from __future__ import annotations

from typing import Final

from pitfs.model.window import MIN_WINDOW_BYTES, check_window

SPARE_BYTES: Final = 64 << 20  # for the windows beside one of full size
SHARE: Final = 4  # a connection gets this part of what is left: others will come


class WindowPool:
    """Shares out `limit_bytes` + SPARE_BYTES among the windows of one replica's connections.

    A decoder holds as much memory as its window is large, so ten groups can't all have the largest window. As long
    as the windows fit into `limit_bytes`, a connection gets what its sender offers. After that it gets at most a
    fourth of what is left, rounded down to a power of two, and at least the smallest window. With a limit of 32 MiB
    and senders that offer as much, the windows are 32, 16, 8, 8, 8, 4 … MiB. A window never changes while its
    connection lives, since the decoder can't forget what the encoder may still refer to.
    """

    def __init__(self, limit_bytes: int) -> None:
        check_window(limit_bytes)
        self.limit_bytes = limit_bytes
        self.taken_bytes = 0

    def take(self, offered_bytes: int) -> int:
        """Gives the window for one more connection, whose sender offers `offered_bytes`; to be given back."""
        wanted = min(offered_bytes, self.limit_bytes)
        if self.taken_bytes + wanted > self.limit_bytes:
            share = max(self.limit_bytes + SPARE_BYTES - self.taken_bytes, 0) // SHARE
            power = 1 << share.bit_length() >> 1
            wanted = min(wanted, max(power, MIN_WINDOW_BYTES))
        self.taken_bytes += wanted
        return wanted

    def give_back(self, window_bytes: int) -> None:
        self.taken_bytes -= window_bytes
