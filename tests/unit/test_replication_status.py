"""What is said of a link that fails: when, how often, until when."""

from __future__ import annotations

import logging

import pytest
import trio
import trio.testing

from pitfs.errors import CapacityError, LinkError, PitfsError
from pitfs.journal.writer import Location
from pitfs.model.transfer import Welcome
from pitfs.replication.phases import Phase
from pitfs.replication.status import BACKOFF_S, ReplicationStatus


def connecting(status: ReplicationStatus) -> None:
    status.enter(Phase.CONNECTING)


async def failing(status: ReplicationStatus, error: PitfsError) -> None:
    connecting(status)
    await trio.sleep(1)
    status.link_failed(error)


async def test_each_new_cause_is_logged_once_and_the_first_failure_begins_the_outage(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    status = ReplicationStatus("here")
    assert status.link == "connecting" and status.link_error is None
    for words in ("refused", "refused", "no route"):
        await failing(status, LinkError(words))
    assert [record.message.split(": ")[1] for record in caplog.records] == [
        "refused; writes go on and are journalled", "no route; writes go on and are journalled",
    ]  # fmt: skip
    assert status.outage is not None and status.outage.since_s == pytest.approx(1.0) and status.outage.attempts == 3


async def test_the_wait_grows_until_something_gets_through(autojump_clock: trio.testing.MockClock) -> None:
    status, waits = ReplicationStatus("here"), []
    for through in (False, False, True, False):
        connecting(status)
        if through:
            status.got_through()
        status.link_failed(LinkError("cut"))
        before = trio.current_time()
        await status.back_off()
        waits.append(trio.current_time() - before)
    assert waits == pytest.approx([BACKOFF_S[1], BACKOFF_S[2], BACKOFF_S[0], BACKOFF_S[1]])


@pytest.mark.parametrize(("error", "words"), [(LinkError("cut"), "connected"), (CapacityError("full"), "full")])
async def test_a_transfer_that_the_replica_takes_ends_what_was_the_links_fault(error: PitfsError, words: str) -> None:
    status = ReplicationStatus("here")
    await failing(status, error)
    connecting(status)
    assert status.link == str(error)
    status.enter(Phase.LOCATING)
    status.transfer_begun()
    assert status.link == words
    status.acknowledged(Welcome(1, 0, 0, 0), Location(1, 0))
    assert status.link == "connected" and status.outage is None
