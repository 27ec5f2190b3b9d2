"""When the codec steps back, and when it comes back: a compressor and a link of given speeds, and no clock."""

from __future__ import annotations

import itertools

import pytest

from pitfs.link.codec.adaptive import MAX_WAIT, MIN_WAIT, PERIOD_BYTES, AdaptiveCompression

MIB = 1 << 20
BATCH_BYTES = 4 * MIB
BUFFERS_BYTES = 10 * MIB  # what queues and sockets swallow before anyone waits
COMPRESSOR = 400e6  # bytes/s
GIGABIT = 118e6
LOOPBACK = 2000e6


class Pipe:
    """Shows batches to an AdaptiveCompression; caller, compressor and link work at the same time."""

    def __init__(
        self,
        compression: AdaptiveCompression,
        *,
        link: float,
        ratio: float = 0.5,
        caller: float = 1e10,
        seen: float | None = None,
    ) -> None:
        self.compression, self.link, self.ratio, self.caller = compression, link, ratio, caller
        self.seen = seen  # of the link, by the kernel; None: what it is
        self.raw_bytes = self.bytes = 0
        self._waiting_bytes = 0.0  # behind the encoder

    def run(self, megabytes: int) -> list[bool]:
        """What was compressed, batch by batch."""
        choices = []
        for _ in range(0, megabytes * 10**6, BATCH_BYTES):
            compresses = self.compression.compresses
            choices.append(compresses)
            self.bytes += BATCH_BYTES
            self.raw_bytes += 0 if compresses else BATCH_BYTES
            encode_s = BATCH_BYTES / COMPRESSOR if compresses else 1e-4
            idle_s = max(BATCH_BYTES / self.caller - encode_s, 0)
            self._waiting_bytes += BATCH_BYTES * (self.ratio if compresses else 1)
            self._waiting_bytes = max(self._waiting_bytes - self.link * (idle_s + encode_s), 0)
            room_s = max(self._waiting_bytes - BUFFERS_BYTES, 0) / self.link
            self._waiting_bytes -= room_s * self.link
            self.compression.observe(
                BATCH_BYTES,
                idle_s=idle_s,
                encode_s=encode_s,
                room_s=room_s,
                link_bytes_per_s=self.link if self.seen is None else self.seen,
            )
        return choices


def test_on_a_link_faster_than_the_compressor_it_steps_back_soon_and_stays() -> None:
    choices = Pipe(AdaptiveCompression(), link=LOOPBACK).run(10_000)
    first = choices.index(False)
    assert first * BATCH_BYTES <= (MIN_WAIT + 1) * PERIOD_BYTES
    assert not any(choices[first:])


def test_where_the_link_holds_things_up_everything_is_compressed() -> None:
    assert all(Pipe(AdaptiveCompression(), link=GIGABIT).run(20_000))


def test_where_the_caller_holds_things_up_everything_is_compressed() -> None:
    assert all(Pipe(AdaptiveCompression(), link=LOOPBACK, caller=COMPRESSOR / 2).run(20_000))


def test_a_link_that_carries_more_compressed_than_raw_is_not_tried() -> None:
    """Gigabit and data that shrink to a tenth: the compressor holds things up, and yet it pays."""
    assert all(Pipe(AdaptiveCompression(), link=GIGABIT, ratio=0.1).run(40_000))


def test_nor_is_one_of_which_nothing_is_known() -> None:
    assert all(Pipe(AdaptiveCompression(), link=LOOPBACK, seen=0).run(2000))


def tries(choices: list[bool]) -> list[int]:
    return [index for index in range(1, len(choices)) if choices[index - 1] and not choices[index]]


@pytest.mark.parametrize("link", [GIGABIT, GIGABIT / 10])
def test_a_link_that_only_looks_fast_is_tried_now_and_then_and_ever_more_rarely(link: float) -> None:
    """A token bucket, or a proxy, takes bursts faster than it passes them on."""
    pipe = Pipe(AdaptiveCompression(), link=link, ratio=0.01, seen=LOOPBACK)
    found = tries(pipe.run(40_000))
    waits = [later - before for before, later in itertools.pairwise(found)]
    assert len(waits) >= 3 and all(later > 3 * before for before, later in itertools.pairwise(waits))
    assert 0 < pipe.raw_bytes <= len(found) * 24 * MIB


def test_tries_do_not_become_rarer_than_that() -> None:
    pipe = Pipe(AdaptiveCompression(), link=GIGABIT, ratio=0.1, seen=LOOPBACK)
    assert len(tries(pipe.run(5 * MAX_WAIT * PERIOD_BYTES // 10**6))) >= 7


def test_no_try_where_the_configured_rate_is_below_the_compressor() -> None:
    assert all(Pipe(AdaptiveCompression(GIGABIT), link=GIGABIT, ratio=0.1, seen=LOOPBACK).run(40_000))
    assert not all(Pipe(AdaptiveCompression(LOOPBACK), link=LOOPBACK).run(1000))


def test_when_the_link_becomes_slow_it_comes_back_at_once_and_when_it_is_fast_again_steps_back_soon() -> None:
    pipe = Pipe(AdaptiveCompression(), link=LOOPBACK)
    pipe.run(5000)
    pipe.link = GIGABIT
    choices = pipe.run(2000)
    assert choices.index(True) * BATCH_BYTES <= 3 * PERIOD_BYTES and all(choices[choices.index(True) :])
    pipe.link = LOOPBACK
    assert pipe.run(1000).index(False) * BATCH_BYTES <= (MIN_WAIT + 2) * PERIOD_BYTES


def test_when_less_is_to_be_sent_than_the_compressor_takes_it_comes_back() -> None:
    pipe = Pipe(AdaptiveCompression(), link=LOOPBACK)
    pipe.run(5000)
    pipe.caller = COMPRESSOR / 4
    choices = pipe.run(1000)
    assert choices.index(True) * BATCH_BYTES <= 3 * PERIOD_BYTES and all(choices[choices.index(True) :])


def test_frames_without_payload_change_nothing() -> None:
    compression = AdaptiveCompression()
    for _ in range(1000):
        compression.observe(0, idle_s=0.0, encode_s=1.0, room_s=0.0, link_bytes_per_s=LOOPBACK)
    assert compression.compresses
