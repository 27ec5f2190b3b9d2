"""Mode sync: a write is answered when the replica has it durably.

    A write waits         if the replica is in step, or always if `on_disconnect` is "block".
    A write doesn't wait  in the other modes; during a bypass; and from the beginning of a full sync until the
                          replica has caught up, as the replica can't have it soon.
"""

from __future__ import annotations

import logging
import math
from typing import Final

import trio

log = logging.getLogger(__name__)

ANSWER_S: Final = 10.0  # how long a write waits for a silent link, where on_disconnect is "degrade"


class SyncGate:
    """What the shipper reports of the replica, and the writes that wait for it.

    Args:
        holds: mode is sync. blocks: on_disconnect is "block".
        copying: whether a full sync is under way at the start.
    """

    def __init__(self, holds: bool, blocks: bool, copying: bool) -> None:
        self.holds = holds
        self._blocks = blocks
        self._catching_up = copying
        self._seq = 0  # that the replica has durably
        self._given_up_seq = 0  # the write that waited too long: until the replica has it, it isn't in step
        self._in_step = False
        self._cause = "not connected yet"
        self._changed = trio.lowlevel.ParkingLot()
        self._stopping = False
        self.waiting_count = 0

    def replicated(self, seq: int, in_step: bool, cause: str = "") -> None:
        """The replica durably has every write up to `seq`; it is in step, or it isn't, and why."""
        self._seq = max(self._seq, seq)
        if in_step and self._seq < self._given_up_seq:
            in_step, cause = False, self._cause
        if in_step != self._in_step:
            log.log(
                logging.INFO if in_step else logging.WARNING,
                "mode sync: %s",
                "the replica has every write before it is answered" if in_step else f"not in step: {cause}",
            )
        self._in_step, self._cause = in_step, cause
        self._catching_up = self._catching_up and not in_step
        self._changed.unpark_all()

    def stop(self) -> None:
        """Releases the writes that wait."""
        self._stopping = True
        self._changed.unpark_all()

    async def wait(self, seq: int, copying: bool) -> bool:
        """Returns when write `seq` may be answered; False: it must not be, the splitter stops."""
        if copying:
            self._catching_up = True
        self.waiting_count += 1
        try:
            while self._waits and self._seq < seq:
                if self._stopping:
                    return False
                with trio.move_on_after(math.inf if self._blocks else ANSWER_S) as scope:
                    await self._changed.park()
                if scope.cancelled_caught and self._in_step:
                    self._given_up_seq = seq
                    self.replicated(self._seq, False, f"the replica hasn't answered for {ANSWER_S:g} s")
        finally:
            self.waiting_count -= 1
        return True

    @property
    def _waits(self) -> bool:
        return self.holds and not self._catching_up and (self._blocks or self._in_step)

    @property
    def text(self) -> str | None:
        """What `pitfs status` says of it; None in other modes."""
        if not self.holds:
            return None
        if self._in_step:
            return "in step"
        if self._catching_up:
            return "catching up: writes don't wait for the replica yet"
        return f"{'writes wait' if self._blocks else 'degraded, writes do not wait'}: {self._cause}"
