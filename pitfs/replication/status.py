"""Where shipping stands: what the replica has, whether anything gets through and why not, who waits for it."""

from __future__ import annotations

import logging
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Final

import trio

from pitfs.errors import CapacityError, LinkError, PitfsError
from pitfs.journal.writer import Location
from pitfs.model.granularity import Decision
from pitfs.model.transfer import Welcome

log = logging.getLogger(__name__)

BACKOFF_S: Final = (0.5, 1.0, 2.0, 5.0, 10.0)
MEASUREMENTS: Final = 5


class InGapError(PitfsError):
    """A mark lies in a gap: the replica got a complete copy of a later state instead."""


@dataclass(slots=True)
class ReplicationStatus:
    """Where shipping stands, for status and for who waits.

    Attributes:
        peer: HOST:PORT of the replica.
        committed: the replica's last word, None before the first.
        committed_location: where the journal goes on behind it.
        connected: whether there is a session.
        link_error: why nothing gets through, None once something does. A new connection alone doesn't clear
            it: the replica may refuse what is sent on it, again and again.
        down_since: trio's clock when that began.
        failures: how often a connection failed.
        settled: the last mark up to which the replica has what the link had room for at first; more may follow.
        lost: marks from the first (exclusive) to the second (exclusive) lie in the last gap, and its cause.
        way: how writes go, and why so, in words.
        wire_ratio: bytes on the wire for each byte of payload, of the last transfer that was measurable.
    """

    peer: str
    committed: Welcome | None = None
    committed_location: Location | None = None
    connected: bool = False
    link_error: PitfsError | None = None
    down_since: float = 0.0
    failures: int = 0
    settled: int = 0
    lost: tuple[int, int, str] = (0, 0, "")
    last_decision: Decision | None = None
    way: str = "nothing yet"
    rates: deque[float] = field(default_factory=lambda: deque(maxlen=MEASUREMENTS))
    wire_ratio: float = 1.0
    _changed: trio.Event = field(default_factory=trio.Event)
    _hurry: trio.Event = field(default_factory=trio.Event)  # somebody waits: connect now
    _moved: bool = False  # whether anything got through on this connection
    _said: str = ""  # the last cause that was logged since anything got through
    _attempt: int = 0  # connections in a row on which nothing got through

    def _change(self) -> None:
        """Wakes who waits for a change."""
        self._changed.set()
        self._changed = trio.Event()

    # -- told by who ships -------------------------------------------------------------------------------

    def link_down(self, error: PitfsError) -> None:
        """A connection failed; the log has each new cause once."""
        if self._said != str(error):
            level = logging.INFO if error.retryable else logging.ERROR
            log.log(level, "not replicating: %s; writes go on and are journalled", error)
        if not self._said:
            self.down_since = trio.current_time()
        self._said = str(error)
        self._attempt = 0 if self._moved else self._attempt + 1
        self._moved, self.connected, self.link_error = False, False, error
        self.failures += 1
        self._change()

    async def back_off(self) -> None:
        """Until the next attempt is due: longer after each that failed, at once if somebody waits for it."""
        self._hurry = trio.Event()
        with trio.move_on_after(BACKOFF_S[min(self._attempt, len(BACKOFF_S) - 1)]):
            await self._hurry.wait()

    def begun(self) -> None:
        """The replica takes a transfer: it may be long until any of it is durable, but it is under way."""
        error = self.link_error
        if error is not None and error.retryable and not isinstance(error, CapacityError):
            self.link_error = None
            self._change()

    def getting_through(self, *_: object) -> None:
        """Something arrived, or there is nothing to send: the link works."""
        if not self._moved:
            self._moved, self._said, self.link_error = True, "", None
            log.info("replicating to %s", self.peer)
            self._change()

    def arrived(self, welcome: Welcome, location: Location | None) -> None:
        """The replica's word, at the start of a session (then without a location) and for each transfer."""
        self.committed = welcome
        if location is not None:
            self.committed_location = location
        else:
            self.settled = max(self.settled, welcome.mark)
        self._change()

    def settle(self, mark: int) -> None:
        """Of the intervals up to this mark the replica has what the link had room for at first."""
        self.settled = max(self.settled, mark)
        self._change()

    # -- asked -------------------------------------------------------------------------------------------

    @property
    def measured_rate(self) -> float | None:
        """Bytes of payload per second that the replica acknowledged of late; None before the first measurement."""
        return statistics.median(self.rates) if self.rates else None

    @property
    def link(self) -> str:
        """For status: `connected`, `connecting`, or why not."""
        return str(self.link_error or ("connected" if self.connected else "connecting"))

    async def wait_committed(self, mark: int, grace_s: float) -> None:
        """Returns when the replica has acknowledged `mark`.

        Raises:
            InGapError: it never will: a complete copy of a later state went instead.
            PitfsError: nothing got through for `grace_s`, or can't until somebody changes something.
        """
        begun, failures = trio.current_time(), self.failures
        self._hurry.set()
        while self.committed is None or self.committed.mark < mark:
            changed, error = self._changed, self.link_error
            if error is None and self.connected:
                await changed.wait()
                continue
            error = error or LinkError(f"{self.peer}: no answer yet")
            left = max(begun, self.down_since) + grace_s - trio.current_time()
            if left <= 0 or (not error.retryable and self.failures > failures):
                raise PitfsError(str(error)) from error
            with trio.move_on_after(left):
                await changed.wait()
        before, after, cause = self.lost
        if before < mark < after:
            raise InGapError(cause)
        # Its difference journal follows at once. Whoever waits for a snapshot goes on to look at what lies before it.
        while self.settled < mark and self.connected and self.link_error is None and self.committed.mark == mark:
            await self._changed.wait()
