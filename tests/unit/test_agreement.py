"""Mode sync: which writes wait for the replica, and for how long."""

from __future__ import annotations

import trio
import trio.testing

from pitfs.splitter.sync_gate import ANSWER_S, SyncGate


async def waits(agreement: SyncGate, seq: int, copying: bool = False) -> bool:
    """Whether that write isn't answered at once."""
    answered = False

    async def write() -> None:
        nonlocal answered
        answered = await agreement.wait(seq, copying)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    return not answered


async def answered_after(agreement: SyncGate, seq: int) -> float:
    begun = trio.current_time()
    assert await agreement.wait(seq, False)
    return trio.current_time() - begun


async def test_in_other_modes_nothing_waits() -> None:
    agreement = SyncGate(holds=False, blocks=True, copying=False)
    assert not await waits(agreement, 5) and agreement.text is None


async def test_a_write_waits_until_the_replica_has_it(autojump_clock: trio.testing.MockClock) -> None:
    agreement = SyncGate(holds=True, blocks=False, copying=False)
    agreement.replicated(4, True)
    assert agreement.text == "in step"

    async def reply() -> None:
        await trio.sleep(1)
        agreement.replicated(4, True)
        await trio.sleep(1)
        agreement.replicated(5, True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reply)
        assert await answered_after(agreement, 5) == 2
    assert agreement.waiting_count == 0


async def test_degrade_goes_on_without_a_replica_and_says_so(autojump_clock: trio.testing.MockClock) -> None:
    agreement = SyncGate(holds=True, blocks=False, copying=False)
    assert await answered_after(agreement, 1) == 0  # never connected
    agreement.replicated(1, True)

    async def cut() -> None:
        await trio.sleep(2)
        agreement.replicated(1, False, "the link is down")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cut)
        assert await answered_after(agreement, 2) == 2
    assert agreement.text == "degraded, writes do not wait: the link is down"
    assert await answered_after(agreement, 3) == 0


async def test_degrade_waits_for_a_silent_link_so_long_only(autojump_clock: trio.testing.MockClock) -> None:
    agreement = SyncGate(holds=True, blocks=False, copying=False)
    agreement.replicated(1, True)
    assert await answered_after(agreement, 2) == ANSWER_S
    assert await answered_after(agreement, 3) == 0
    assert "hasn't answered" in (agreement.text or "")
    agreement.replicated(3, True)  # it came back
    assert agreement.text == "in step"


async def test_block_waits_for_as_long_as_it_takes(autojump_clock: trio.testing.MockClock) -> None:
    agreement = SyncGate(holds=True, blocks=True, copying=False)

    async def come_back() -> None:
        await trio.sleep(3600)
        agreement.replicated(2, True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(come_back)
        assert await answered_after(agreement, 2) == 3600
        agreement.replicated(2, False, "the link is down")
        assert agreement.text == "writes wait: the link is down"
        with trio.move_on_after(100) as scope:
            await agreement.wait(3, False)
        assert scope.cancelled_caught


async def test_what_is_written_during_a_copy_waits_for_nothing_until_the_replica_has_caught_up() -> None:
    agreement = SyncGate(holds=True, blocks=True, copying=True)
    assert not await waits(agreement, 1, copying=True)
    assert not await waits(agreement, 2)
    assert "catching up" in (agreement.text or "")
    agreement.replicated(2, True)
    agreement.replicated(2, False, "down")
    assert await waits(agreement, 3)


async def test_a_stop_lets_go_of_writes_unanswered() -> None:
    agreement = SyncGate(holds=True, blocks=True, copying=False)
    async with trio.open_nursery() as nursery:
        results: list[bool] = []

        async def write() -> None:
            results.append(await agreement.wait(1, False))

        nursery.start_soon(write)
        await trio.testing.wait_all_tasks_blocked()
        assert agreement.waiting_count == 1
        agreement.stop()
    assert results == [False]


async def test_after_a_silence_it_is_in_step_once_it_has_what_was_answered_without_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    agreement = SyncGate(holds=True, blocks=False, copying=False)
    agreement.replicated(1, True)
    assert await answered_after(agreement, 9) == ANSWER_S
    agreement.replicated(2, True)  # as it says what it had said before the silence
    assert agreement.text != "in step" and await answered_after(agreement, 10) == 0
    agreement.replicated(9, True)
    assert agreement.text == "in step"
