"""Mode sync: which writes wait for the replica, and for how long."""

from __future__ import annotations

import trio
import trio.testing

from pitfs.splitter.sync_gate import ANSWER_S, SyncGate


async def waits(gate: SyncGate, seq: int, copying: bool = False) -> bool:
    """Whether that write isn't answered at once."""
    answered = False

    async def write() -> None:
        nonlocal answered
        answered = await gate.wait(seq, copying)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    return not answered


async def answered_after(gate: SyncGate, seq: int) -> float:
    begun = trio.current_time()
    assert await gate.wait(seq, False)
    return trio.current_time() - begun


async def test_in_other_modes_nothing_waits() -> None:
    gate = SyncGate(holds=False, blocks=True, copying=False)
    assert not await waits(gate, 5) and gate.text is None


async def test_a_write_waits_until_the_replica_has_it(autojump_clock: trio.testing.MockClock) -> None:
    gate = SyncGate(holds=True, blocks=False, copying=False)
    gate.replicated(4, True)
    assert gate.text == "in step"

    async def reply() -> None:
        await trio.sleep(1)
        gate.replicated(4, True)
        await trio.sleep(1)
        gate.replicated(5, True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reply)
        assert await answered_after(gate, 5) == 2
    assert gate.waiting_count == 0


async def test_degrade_goes_on_without_a_replica_and_says_so(autojump_clock: trio.testing.MockClock) -> None:
    gate = SyncGate(holds=True, blocks=False, copying=False)
    assert await answered_after(gate, 1) == 0  # never connected
    gate.replicated(1, True)

    async def cut() -> None:
        await trio.sleep(2)
        gate.replicated(1, False, "the link is down")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cut)
        assert await answered_after(gate, 2) == 2
    assert gate.text == "degraded, writes do not wait: the link is down"
    assert await answered_after(gate, 3) == 0


async def test_degrade_waits_for_a_silent_link_so_long_only(autojump_clock: trio.testing.MockClock) -> None:
    gate = SyncGate(holds=True, blocks=False, copying=False)
    gate.replicated(1, True)
    assert await answered_after(gate, 2) == ANSWER_S
    assert await answered_after(gate, 3) == 0
    assert "hasn't answered" in (gate.text or "")
    gate.replicated(3, True)  # it came back
    assert gate.text == "in step"


async def test_block_waits_for_as_long_as_it_takes(autojump_clock: trio.testing.MockClock) -> None:
    gate = SyncGate(holds=True, blocks=True, copying=False)

    async def come_back() -> None:
        await trio.sleep(3600)
        gate.replicated(2, True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(come_back)
        assert await answered_after(gate, 2) == 3600
        gate.replicated(2, False, "the link is down")
        assert gate.text == "writes wait: the link is down"
        with trio.move_on_after(100) as scope:
            await gate.wait(3, False)
        assert scope.cancelled_caught


async def test_what_is_written_during_a_copy_waits_for_nothing_until_the_replica_has_caught_up() -> None:
    gate = SyncGate(holds=True, blocks=True, copying=True)
    assert not await waits(gate, 1, copying=True)
    assert not await waits(gate, 2)
    assert "catching up" in (gate.text or "")
    gate.replicated(2, True)
    gate.replicated(2, False, "down")
    assert await waits(gate, 3)


async def test_a_stop_lets_go_of_writes_unanswered() -> None:
    gate = SyncGate(holds=True, blocks=True, copying=False)
    async with trio.open_nursery() as nursery:
        results: list[bool] = []

        async def write() -> None:
            results.append(await gate.wait(1, False))

        nursery.start_soon(write)
        await trio.testing.wait_all_tasks_blocked()
        assert gate.waiting_count == 1
        gate.stop()
    assert results == [False]


async def test_after_a_silence_it_is_in_step_once_it_has_what_was_answered_without_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    gate = SyncGate(holds=True, blocks=False, copying=False)
    gate.replicated(1, True)
    assert await answered_after(gate, 9) == ANSWER_S
    gate.replicated(2, True)  # as it says what it had said before the silence
    assert gate.text != "in step" and await answered_after(gate, 10) == 0
    gate.replicated(9, True)
    assert gate.text == "in step"
