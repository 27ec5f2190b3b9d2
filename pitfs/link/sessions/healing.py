"""The replica asks for contents that its store lacks, beside all else that a session carries: from version 2 on.

    healer --wanted--> WANT --> production --> GIVEN, one for each content --take--> healer
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final, Protocol

import trio

from pitfs.errors import PitfsError
from pitfs.model.transfer import MAX_WANTED, Given, Hello, Want, Wanted

log = logging.getLogger(__name__)

LOOK_S: Final = 1.0  # how often the healer looks whether something is wanted
RETRY_S: Final = 30.0  # after an error of the store's disk


class HealerProtocol(Protocol):
    """What mends the store of one session; called from threads, one call at a time, beside the calls of the ingest."""

    def wanted(self) -> Sequence[Wanted]:
        """What is wanted next, at most MAX_WANTED; none where nothing is."""

    def take(self, contents: Sequence[bytes | None]) -> None:
        """The answers for what `wanted` gave last, in order; None for a content that production has no more."""

    def close(self) -> None: ...


OpenHealer = Callable[[Hello], HealerProtocol]


class Healing:
    """The healing of one session's store.

    Args:
        send: queues a frame. in_thread: calls a function in a thread.
    """

    def __init__(self, send: Callable[[Want], None], in_thread: Callable[[Callable[[], Any]], Awaitable[Any]]) -> None:
        self._send, self._in_thread = send, in_thread
        self._contents, self._next_content = trio.open_memory_channel[bytes | None](MAX_WANTED)

    def given(self, frame: Given) -> None:
        """An answer came; the protocol lets no more of them through than were asked for."""
        self._contents.send_nowait(frame.content)

    async def run(self, healer: HealerProtocol) -> None:
        """Asks while something is wanted. Errors of the store are logged, since replication goes on."""
        while True:
            wanted: Sequence[Wanted] | None = await self._tried(healer.wanted)
            if not wanted:
                await trio.sleep(LOOK_S)
                continue
            self._send(Want(tuple(wanted)))
            contents = [await self._next_content.receive() for _ in wanted]
            await self._tried(partial(healer.take, contents))

    async def _tried(self, call: Callable[[], Any]) -> Any:
        try:
            return await self._in_thread(call)
        except (PitfsError, OSError) as error:
            log.error("damage isn't healed: %s", error)
            await trio.sleep(RETRY_S)
