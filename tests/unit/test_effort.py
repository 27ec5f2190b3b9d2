"""When the codec steps back, and when it comes back: a compressor and a link of given speeds, and no clock."""

from __future__ import annotations

import itertools

from pitfs.link.effort import MAX_WAIT, MIN_WAIT, PERIOD_BYTES, Effort

MIB = 1 << 20
BATCH_BYTES = 4 * MIB
BUFFERS_BYTES = 10 * MIB  # what queues and sockets swallow before anyone waits
COMPRESSOR = 400e6  # bytes/s
GIGABIT = 118e6
LOOPBACK = 2000e6


class Pipe:
    """Gives an Effort batches as they would be timed: caller, compressor and link work at the same time."""

    def __init__(self, effort: Effort, *, link: float, ratio: float = 0.5, caller: float = 1e10) -> None:
        self.effort, self.link, self.ratio, self.caller = effort, link, ratio, caller
        self.raw_bytes = self.bytes = 0
        self._waiting_bytes = 0.0  # behind the encoder

    def run(self, megabytes: int) -> list[bool]:
        """What was compressed, batch by batch."""
        choices = []
        for _ in range(0, megabytes * 10**6, BATCH_BYTES):
            compresses = self.effort.compresses
            choices.append(compresses)
            self.bytes += BATCH_BYTES
            self.raw_bytes += 0 if compresses else BATCH_BYTES
            encode_s = BATCH_BYTES / COMPRESSOR if compresses else 1e-4
            idle_s = max(BATCH_BYTES / self.caller - encode_s, 0)
            self._waiting_bytes += BATCH_BYTES * (self.ratio if compresses else 1)
            self._waiting_bytes = max(self._waiting_bytes - self.link * (idle_s + encode_s), 0)
            room_s = max(self._waiting_bytes - BUFFERS_BYTES, 0) / self.link
            self._waiting_bytes -= room_s * self.link
            self.effort.observe(BATCH_BYTES, idle_s=idle_s, encode_s=encode_s, room_s=room_s)
        return choices


def test_on_a_link_faster_than_the_compressor_it_steps_back_soon_and_stays() -> None:
    choices = Pipe(Effort(), link=LOOPBACK).run(10_000)
    first = choices.index(False)
    assert first * BATCH_BYTES <= (MIN_WAIT + 1) * PERIOD_BYTES
    assert not any(choices[first:])


def test_where_the_link_holds_things_up_everything_is_compressed() -> None:
    assert all(Pipe(Effort(), link=GIGABIT).run(20_000))


def test_where_the_caller_holds_things_up_everything_is_compressed() -> None:
    assert all(Pipe(Effort(), link=LOOPBACK, caller=COMPRESSOR / 2).run(20_000))


def test_a_link_that_carries_more_compressed_than_raw_is_tried_now_and_then_and_ever_more_rarely() -> None:
    """Gigabit and data that shrink to a tenth: the compressor holds things up, and yet it pays."""
    pipe = Pipe(Effort(), link=GIGABIT, ratio=0.1)
    choices = pipe.run(40_000)
    assert 0 < pipe.raw_bytes < 0.01 * pipe.bytes
    tries = [index for index in range(1, len(choices)) if choices[index - 1] and not choices[index]]
    waits = [later - before for before, later in itertools.pairwise(tries)]
    assert len(waits) >= 5 and all(
        later > 1.5 * before for before, later in itertools.pairwise(waits)
    )


def test_tries_do_not_become_rarer_than_that() -> None:
    pipe = Pipe(Effort(), link=GIGABIT, ratio=0.1)
    pipe.run(2 * MAX_WAIT * PERIOD_BYTES // 10**6 * 2)
    choices = pipe.run((MAX_WAIT + 4) * PERIOD_BYTES // 10**6 + 1)
    assert not all(choices)


def test_no_try_where_the_configured_rate_is_below_the_compressor() -> None:
    assert all(Pipe(Effort(GIGABIT), link=GIGABIT, ratio=0.1).run(40_000))
    assert not all(Pipe(Effort(LOOPBACK), link=LOOPBACK).run(1000))


def test_when_the_link_becomes_slow_it_comes_back_at_once_and_when_it_is_fast_again_steps_back_soon() -> None:
    pipe = Pipe(Effort(), link=LOOPBACK)
    pipe.run(5000)
    pipe.link = GIGABIT
    choices = pipe.run(2000)
    assert choices.index(True) * BATCH_BYTES <= 3 * PERIOD_BYTES and all(choices[choices.index(True) :])
    pipe.link = LOOPBACK
    assert pipe.run(1000).index(False) * BATCH_BYTES <= (MIN_WAIT + 2) * PERIOD_BYTES


def test_when_less_is_to_be_sent_than_the_compressor_takes_it_comes_back() -> None:
    pipe = Pipe(Effort(), link=LOOPBACK)
    pipe.run(5000)
    pipe.caller = COMPRESSOR / 4
    choices = pipe.run(1000)
    assert choices.index(True) * BATCH_BYTES <= 3 * PERIOD_BYTES and all(choices[choices.index(True) :])


def test_frames_without_payload_change_nothing() -> None:
    effort = Effort()
    for _ in range(1000):
        effort.observe(0, idle_s=0.0, encode_s=1.0, room_s=0.0)
    assert effort.compresses
