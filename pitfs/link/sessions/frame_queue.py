"""A queue of frames between the tasks of a session, bounded by bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final, Generic, TypeVar

import trio

MAX_CONTROLS: Final = 16  # control frames that may wait beyond a queue's limit; more are dropped (PING, PONG)

T = TypeVar("T")


class FrameQueue(Generic[T]):
    """A queue between tasks, bounded by bytes. One consumer takes all that waits.

    While the consumer works on a batch the queue may fill again: at most twice the limit and one item are held.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._items: deque[tuple[T, int]] = deque()
        self._bytes = 0
        self._controls = 0
        self._closed = False
        self._changed = trio.lowlevel.ParkingLot()

    def __len__(self) -> int:
        return len(self._items)

    async def put(self, item: T, size_bytes: int) -> None:
        """Waits for room, then appends.

        Raises:
            trio.ClosedResourceError: the queue is closed.
        """
        while not self.put_nowait(item, size_bytes):
            await self._changed.park()
        if self._closed:
            raise trio.ClosedResourceError

    def put_nowait(self, item: T, size_bytes: int) -> bool:
        """Appends, or drops the item if the queue is closed; False if there is no room."""
        if self._bytes and self._bytes + size_bytes > self.limit_bytes and not self._closed:
            return False
        if not self._closed:
            self._append(item, size_bytes)
        return True

    def put_control(self, item: T) -> None:
        """Appends at once, or drops the item if too many such wait or the queue is closed."""
        if self._controls < MAX_CONTROLS and not self._closed:
            self._controls += 1
            self._append(item, 0)

    def _append(self, item: T, size_bytes: int) -> None:
        self._items.append((item, size_bytes))
        self._bytes += size_bytes
        self._changed.unpark_all()

    async def take(self, is_last: Callable[[T], bool] | None = None) -> list[T]:
        """Waits until something is there and takes all of it, or up to and with the first item that is last.

        Returns:
            the items; none if the queue is closed and empty.
        """
        while not self._items and not self._closed:
            await self._changed.park()
        batch: list[T] = []
        while self._items:
            item, size_bytes = self._items.popleft()
            self._bytes -= size_bytes
            self._controls -= not size_bytes
            batch.append(item)
            if is_last and is_last(item):
                break
        self._changed.unpark_all()
        return batch

    def close(self, *, discard: bool = False) -> None:
        """Lets nothing more in; what is in can still be taken unless it is discarded."""
        self._closed = True
        if discard:
            self._items.clear()
        self._changed.unpark_all()
