"""The splitter's control socket without a socket: requests and replies of a service in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import msgspec

from pitfs.splitter.messages import REQUESTS, SplitterClient
from pitfs.splitter.service import SplitterService

Reply = TypeVar("Reply")


class DirectChannel:
    """Encodes as the socket does. `service`: the one that answers now, as a test may restart it."""

    def __init__(self, service: Callable[[], SplitterService]) -> None:
        self._service = service

    async def request(self, request: msgspec.Struct, reply_type: type[Reply]) -> Reply:
        answer = await self._service().handle(REQUESTS.decode(msgspec.json.encode(request)))
        return msgspec.json.decode(msgspec.json.encode(answer), type=reply_type)

    async def aclose(self) -> None:
        """Nothing is open."""


def client_of(service: Callable[[], SplitterService]) -> SplitterClient:
    return SplitterClient(DirectChannel(service))
