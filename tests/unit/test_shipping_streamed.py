"""The shipper where it streamed: what the replica has then, and how it goes on from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from pitfs.link.sender import SenderSession
from pitfs.production.reader import Interval
from tests.helpers.shipper import Parts


@pytest.fixture
def parts(tmp_path: Path) -> Any:
    made = Parts(tmp_path)
    yield made
    made.close()


async def stream(parts: Parts, count: int = 3, leave: bool = True) -> None:
    """Streams some writes, and leaves the stream in the middle of the interval."""
    shipper, session = parts.shipper, cast(SenderSession, parts.session)
    if not shipper._stream.active:
        shipper._stream.begin(session, session.welcome.mark)
    for _ in range(count):
        parts.write()
    await shipper._stream.turn(60.0)
    if leave:
        await shipper._stream.leave()


async def test_a_diff_behind_a_stream_that_is_cut_off_is_sent_on_the_next_connection(parts: Parts) -> None:
    await parts.locate()
    await parts.ship()
    await stream(parts)
    parts.write()
    parts.mark()
    interval = await parts.next()
    assert isinstance(interval, Interval)
    session = cast(SenderSession, parts.session)
    send, parts.session.send = parts.session.send, cut  # type: ignore[method-assign]
    with pytest.raises(ConnectionError):
        await parts.shipper._ship_interval(session, interval)
    parts.session.send = send  # type: ignore[method-assign]
    await parts.connect_anew()
    assert isinstance(await parts.ship(), Interval)
    parts.assert_replica_has_all()


async def cut(frame: object) -> None:
    raise ConnectionError


