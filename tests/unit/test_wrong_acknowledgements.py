"""A replica that acknowledges what wasn't sent is told from one that has it: nothing is given back for its word."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from pitfs.errors import RemoteProtocolError
from pitfs.link.protocol.frames import Accept, Committed, Greeting, Resume
from pitfs.link.protocol.protocol import LinkProtocol, Role
from pitfs.model.transfer import Begin, Durable, End, Flush, ResumePoint, StreamMark, Welcome
from tests.helpers.links import HELLO, MANIFEST, NOTHING, joined
from tests.helpers.shipper import Here, Parts


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    made = Parts(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("wrong", [{"mark": 9}, {"seq": 7}, {"time_ns": 5}])
async def test_an_interval_that_is_acknowledged_as_another_is_not(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, int]
) -> None:
    await parts.locate()
    await parts.ship()
    parts.write()
    parts.mark()
    known = parts.shipper.status.committed
    finish = Here.finish

    async def finish_with_another(session: Here, end: End) -> Welcome:
        session.welcome = msgspec.structs.replace(await finish(session, end), **wrong)
        return session.welcome

    monkeypatch.setattr(Here, "finish", finish_with_another)
    words = r"^here: it acknowledges mark \d+ at seq \d+, mark 2 at seq 1 was sent"
    with pytest.raises(RemoteProtocolError, match=words):
        await parts.ship()
    assert parts.shipper.status.committed == known
    assert parts.pipeline.splitter.state.mark == 2


def peers() -> tuple[LinkProtocol, LinkProtocol]:
    """Sender and receiver behind their greeting."""
    sender, receiver = LinkProtocol(Role.SENDER), LinkProtocol(Role.RECEIVER)
    pass_on(sender, receiver, Greeting((1,), HELLO))
    pass_on(receiver, sender, Accept(1, Welcome(3, 12, 70, 80)))
    return sender, receiver


def pass_on(one: LinkProtocol, other: LinkProtocol, frame) -> None:  # type: ignore[no-untyped-def]
    assert list(other.receive(joined(one.send(frame)))) == [frame]


def test_a_mark_that_was_not_streamed_is_not_durable() -> None:
    sender, receiver = peers()
    pass_on(sender, receiver, StreamMark(4, 12, 70, 90))
    pass_on(receiver, sender, Durable(12, 70, 4, 90))
    pass_on(sender, receiver, Flush(12, 1, 95))
    with pytest.raises(RemoteProtocolError, match="DURABLE to mark 5, the last one streamed is 4"):
        list(sender.receive(joined(receiver.send(Durable(12, 70, 5, 95)))))


def test_a_mark_that_came_in_a_transfer_is_known() -> None:
    sender, receiver = peers()
    pass_on(sender, receiver, Begin(MANIFEST))
    pass_on(receiver, sender, Resume(ResumePoint()))
    pass_on(sender, receiver, End((0, 0, 0, 0, 0)))
    pass_on(receiver, sender, Committed(msgspec.structs.replace(NOTHING, mark=8)))
    pass_on(sender, receiver, Flush(0, 1, 95))
    pass_on(receiver, sender, Durable(0, 0, 8, 95))
