"""Whether compressing pays on this connection: where the link is faster than the compressor, it steps back. Pure.

Frames pass one task that waits for input (idle), encodes (encode), and waits for room behind it (room). Which of the
three takes the time says what holds things up: the caller, the compressor, or the link.

    COMPRESSING  while the compressor holds things up nobody knows how fast the link is: after some time, try RAW
    RAW          what goes through in the same time is compared, once the buffers behind are full. At least a fourth
                 more than compressed: stay. Less, whatever the reason: back, and wait twice as long before the next try

Counted in bytes of payload, so that it needs no clock and a test can tell it everything.
"""

from __future__ import annotations

from typing import Final

PERIOD_BYTES: Final = 16 << 20  # one judgement; more than what queues and socket buffers swallow at once
BOUND_SHARE: Final = 0.8  # of the time: then it is the compressor
GAIN: Final = 1.25
MIN_WAIT: Final = 4  # periods before a try: 64 MiB
MAX_WAIT: Final = 1024  # 16 GiB: a try that fails costs 32 MiB raw


class Effort:
    """The decision for one connection.

    Attributes:
        compresses: whether payloads are to be compressed.
    """

    def __init__(self, cap_bytes_per_s: float | None = None) -> None:
        """`cap_bytes_per_s`: the configured rate; a compressor faster than that needn't step back."""
        self.compresses = True
        self._cap = cap_bytes_per_s
        self._wait = self._left = MIN_WAIT  # periods
        self._compressed_speed = 0.0  # bytes/s of payload, when the compressor held things up
        self._settled = False  # RAW: the buffers behind were filled at the link's speed
        self._paid = False  # RAW was worth it at least once since it began
        self._clear()

    def observe(self, payload_bytes: int, *, idle_s: float, encode_s: float, room_s: float) -> None:
        """Tells what one batch took; may change `compresses`."""
        self._bytes += payload_bytes
        self._encode_s += encode_s
        self._total_s += idle_s + encode_s + room_s
        if self._bytes < PERIOD_BYTES:
            return
        speed = self._bytes / max(self._total_s, 1e-9)
        bound = self._encode_s >= BOUND_SHARE * self._total_s
        self._clear()
        if self.compresses:
            self._judge_compressing(speed, bound)
        elif not self._settled:
            self._settled = True
        elif speed >= GAIN * self._compressed_speed:
            self._paid = True
        else:
            self._wait = MIN_WAIT if self._paid else min(2 * self._wait, MAX_WAIT)
            self.compresses, self._left = True, self._wait

    def _judge_compressing(self, speed: float, bound: bool) -> None:
        if not bound or (self._cap is not None and self._cap < GAIN * speed):
            return
        self._left -= 1
        if self._left <= 0:
            self.compresses, self._settled, self._paid = False, False, False
            self._compressed_speed = speed

    def _clear(self) -> None:
        self._bytes = 0
        self._encode_s = self._total_s = 0.0
