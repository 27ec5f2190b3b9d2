"""Whether compressing pays on this connection: where the link is faster than the compressor, it steps back. Pure.

Frames pass one task that waits for input (idle), encodes (encode), and waits for room behind it (room). Which of the
three takes the time says what holds things up: the caller, the compressor, or the link.

    COMPRESSING  the compressor holds things up, and what the kernel saw of the link says that it carries more: try RAW
    SETTLING     raw; the buffers behind have to fill before anything can be said, but it mustn't take too long
    RAW          raw; as long as a fourth more goes through than when the compressor held things up

What the kernel sees of bursts can be far from what the link carries all the time, so tries that fail become rare.
Counted in bytes of payload, so that it needs no clock and a test can tell it everything.
"""

from __future__ import annotations

import enum
from typing import Final

PERIOD_BYTES: Final = 16 << 20  # one judgement; more than what queues and socket buffers swallow at once
BOUND_SHARE: Final = 0.8  # of the time: then it is the compressor
GAIN: Final = 1.25
PATIENCE: Final = 4  # SETTLING: may take so much longer
MIN_WAIT: Final = 8  # periods before a try: 128 MiB
WAIT_GROWTH: Final = 4
MAX_WAIT: Final = 2048  # 32 GiB: a try that fails costs some 20 MiB raw


class CompressionState(enum.Enum):
    COMPRESSING = enum.auto()
    SETTLING = enum.auto()
    RAW = enum.auto()


class AdaptiveCompression:
    """The decision for one connection."""

    def __init__(self, cap_bytes_per_s: float | None = None) -> None:
        """`cap_bytes_per_s`: the configured rate; a compressor faster than that needn't step back."""
        self.state = CompressionState.COMPRESSING
        self.cap_bytes_per_s = cap_bytes_per_s
        self._wait = self._left = MIN_WAIT  # periods
        self._speed = 0.0  # bytes/s of payload, when the compressor held things up
        self._paid = False  # RAW was worth it for a period at least
        self._clear()

    @property
    def compresses(self) -> bool:
        """Whether payloads are to be compressed."""
        return self.state is CompressionState.COMPRESSING

    def observe(
        self, payload_bytes: int, *, idle_s: float, encode_s: float, room_s: float, link_bytes_per_s: float
    ) -> None:
        """Tells what one batch took; may change the state.

        `link_bytes_per_s`: how fast bursts went lately, for want of better while the link isn't full; 0: unknown.
        """
        self._bytes += payload_bytes
        self._encode_s += encode_s
        self._total_s += idle_s + encode_s + room_s
        if self.compresses:
            if self._bytes >= PERIOD_BYTES:
                self._judge_compressing(link_bytes_per_s)
                self._clear()
            return
        limit_s = PERIOD_BYTES / (GAIN * self._speed)
        if self._total_s > limit_s * (PATIENCE if self.state is CompressionState.SETTLING else 1):
            self._wait = MIN_WAIT if self._paid else min(WAIT_GROWTH * self._wait, MAX_WAIT)
            self.state, self._left = CompressionState.COMPRESSING, self._wait
            self._clear()
        elif self._bytes >= PERIOD_BYTES:
            self._paid = self.state is CompressionState.RAW
            self.state = CompressionState.RAW
            self._clear()

    def _judge_compressing(self, link_bytes_per_s: float) -> None:
        speed = self._bytes / max(self._total_s, 1e-9)
        link_speed = link_bytes_per_s if self.cap_bytes_per_s is None else min(self.cap_bytes_per_s, link_bytes_per_s)
        if self._encode_s < BOUND_SHARE * self._total_s or link_speed < GAIN * speed:
            return
        self._left -= 1
        if self._left <= 0:
            self.state, self._speed, self._paid = CompressionState.SETTLING, speed, False

    def _clear(self) -> None:
        self._bytes = 0
        self._encode_s = self._total_s = 0.0
