"""Adaptive compression: payloads go raw while the link is faster than the compressor. Pure.

Frames pass one task, which waits for input (idle), encodes (encode), and waits for room in the queue to the socket
(room). Which of the three takes the time says what the bottleneck is: the caller, the compressor or the link.

    COMPRESSING --the compressor is the bottleneck, and the link seems to carry GAIN times as much--> SETTLING
    SETTLING    --PERIOD_BYTES went through--> RAW          too slow, even with PATIENCE --> COMPRESSING
    RAW         --GAIN times as much as compressed went through--> RAW      less than that --> COMPRESSING

SETTLING is there because the buffers behind the encoder have to fill before raw speed means anything. How fast the
link is comes from the kernel, which measures bursts: a token bucket or a proxy takes these faster than it carries them
on. So a try may fail, and after each failure in a row the next try waits WAIT_GROWTH times as long. Everything is
counted in bytes of payload and in times that the caller measured, so a test needs no clock.
"""

from __future__ import annotations

import enum
from typing import Final

PERIOD_BYTES: Final = 16 << 20  # between two decisions; more than queues and socket buffers take at once
BOUND_SHARE: Final = 0.8  # of the time in the compressor: then it is the bottleneck
GAIN: Final = 1.25
PATIENCE: Final = 4  # SETTLING may take so many times as long as a period of RAW
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
        """`cap_bytes_per_s`: the configured rate; the link counts as no faster than that."""
        self.state = CompressionState.COMPRESSING
        self.cap_bytes_per_s = cap_bytes_per_s
        self._wait = self._left = MIN_WAIT  # periods
        self._speed = 0.0  # bytes/s of payload, when the compressor was the bottleneck
        self._paid = False  # the last try reached RAW and stayed there for a period
        self._clear()

    @property
    def compresses(self) -> bool:
        """Whether payloads are to be compressed."""
        return self.state is CompressionState.COMPRESSING

    def observe(
        self, payload_bytes: int, *, idle_s: float, encode_s: float, room_s: float, link_bytes_per_s: float
    ) -> None:
        """Takes what one batch cost, and may change the state.

        `link_bytes_per_s`: how fast the kernel saw bursts arrive lately; 0: not known.
        """
        self._bytes += payload_bytes
        self._encode_s += encode_s
        self._total_s += idle_s + encode_s + room_s
        if self.compresses:
            if self._bytes >= PERIOD_BYTES:
                self._consider_raw(link_bytes_per_s)
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

    def _consider_raw(self, link_bytes_per_s: float) -> None:
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
