"""What the replica has, what the shipper is doing, whether anything gets through and why not, and who waits for it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Final

import trio

from pitfs.errors import CapacityError, LinkError, PitfsError
from pitfs.journal.writer import Location
from pitfs.model.schedule import Decision, ShippingMode
from pitfs.model.transfer import Welcome
from pitfs.replication.phases import TRANSITIONS, Phase

log = logging.getLogger(__name__)

UNDECIDED: Final = ShippingMode(False, "nothing yet")
BACKOFF_S: Final = (0.5, 1.0, 2.0, 5.0, 10.0)


class InGapError(PitfsError):
    """A mark lies in a gap: the replica got a complete copy of a later state instead."""


@dataclass(slots=True)
class Outage:
    """Nothing has got through yet, or not since a connection failed. It ends when something does.

    A new connection alone doesn't end it: the replica may refuse what is sent on it, again and again.

    Attributes:
        error: of the last connection that failed; None where none has failed yet.
        since_s: trio's clock, when the first one failed.
        attempts: further ones that failed.
        is_resuming: the replica has taken a transfer since: it may be long until any of it is durable, but `error`
            is over.
    """

    error: PitfsError | None = None
    since_s: float = 0.0
    attempts: int = 0
    is_resuming: bool = False


@dataclass(slots=True)
class ReplicationStatus:
    """For `pitfs status`, and for whoever waits for the replica.

    Attributes:
        peer: HOST:PORT of the replica.
        phase: see `enter`.
        committed: the replica's last acknowledgement, None before the first.
        committed_location: where the journal goes on behind it.
        outage: None while something gets through.
        first_pass_mark: of the intervals up to this mark the replica has what the link had room for; more may follow.
        lost_marks: those in the last gap; lost_cause: why it came to be.
        last_decision: what was sent of the last interval, and why no more.
        mode: how writes go, and why so.
        changed: set at the next change of these, and made anew.
    """

    peer: str
    phase: Phase = Phase.DISCONNECTED
    committed: Welcome | None = None
    committed_location: Location | None = None
    outage: Outage | None = field(default_factory=Outage)
    first_pass_mark: int = 0
    lost_marks: range = range(0)
    lost_cause: str = ""
    last_decision: Decision | None = None
    mode: ShippingMode = UNDECIDED
    changed: trio.Event = field(default_factory=trio.Event)
    _hurry: trio.Event = field(default_factory=trio.Event)  # somebody waits: connect now

    def _change(self) -> None:
        """Wakes who waits for a change."""
        self.changed.set()
        self.changed = trio.Event()

    # -- set by the shipper ------------------------------------------------------------------------------

    def enter(self, phase: Phase) -> None:
        """Goes over into another phase. Raises AssertionError for one that can't follow: a mistake of ours."""
        if phase not in TRANSITIONS[self.phase]:
            raise AssertionError(f"the shipper can't go from {self.phase.name} to {phase.name}")
        self.phase = phase

    def link_failed(self, error: PitfsError) -> None:
        """A connection failed; the log has each new cause once."""
        before = self.outage or Outage(attempts=-1)
        since_s = trio.current_time() if before.error is None else before.since_s
        self.outage = Outage(error, since_s, before.attempts + 1)
        if str(before.error) != str(error):
            level = logging.INFO if error.retryable else logging.ERROR
            log.log(level, "not replicating: %s; writes go on and are journalled", error)
        self.enter(Phase.DISCONNECTED)
        self._change()

    async def back_off(self) -> None:
        """Until the next attempt is due: longer after each that failed, at once if somebody waits for it."""
        self._hurry = trio.Event()
        attempts = self.outage.attempts if self.outage is not None else 0
        with trio.move_on_after(BACKOFF_S[min(attempts, len(BACKOFF_S) - 1)]):
            await self._hurry.wait()

    def transfer_begun(self) -> None:
        """The replica takes a transfer."""
        outage, error = self.outage, self.link_error
        if outage and error and error.retryable and not isinstance(error, CapacityError):
            outage.is_resuming = True
            self._change()

    def got_through(self, *_: object) -> None:
        """Something arrived, or there is nothing to send: the link works."""
        if self.outage is not None:
            self.outage = None
            log.info("replicating to %s", self.peer)
            self._change()

    def connected(self, welcome: Welcome) -> None:
        """A session began: what the replica has then isn't going to get more of what the link had room for."""
        self.committed = welcome
        self.first_pass_done(welcome.mark)

    def located(self, location: Location) -> None:
        """The journal goes on there behind what the replica had at the start of a session."""
        if self.committed_location is None:
            self.committed_location = location

    def acknowledged(self, welcome: Welcome, location: Location, layers_follow: bool = False) -> None:
        """The replica has what was sent; the journal goes on at `location` behind it."""
        self.got_through()
        self.committed, self.committed_location = welcome, location
        self.first_pass_done(0 if layers_follow else welcome.mark)

    def first_pass_done(self, mark: int) -> None:
        """Of the intervals up to this mark the replica has what the link had room for."""
        self.first_pass_mark = max(self.first_pass_mark, mark)
        self._change()

    # -- asked -------------------------------------------------------------------------------------------

    @property
    def link_error(self) -> PitfsError | None:
        """Why nothing gets through, as far as that is known and not over."""
        return None if self.outage is None or self.outage.is_resuming else self.outage.error

    @property
    def link_down_s(self) -> float | None:
        """For how long nothing has got through; None while something may."""
        outage = self.outage
        return trio.current_time() - outage.since_s if outage is not None and self.link_error is not None else None

    @property
    def link(self) -> str:
        """For status: `connected`, `connecting`, or why not."""
        return str(self.link_error or ("connected" if self.phase.is_connected else "connecting"))

    async def wait_committed(self, mark: int, grace_s: float) -> None:
        """Returns when the replica has acknowledged `mark`.

        Raises:
            InGapError: it never will: a complete copy of a later state went instead.
            PitfsError: nothing got through for `grace_s`, or can't until somebody changes something.
        """
        begun, outage = trio.current_time(), self.outage
        self._hurry.set()
        while self.committed is None or self.committed.mark < mark:
            changed, error = self.changed, self.link_error
            if error is None and self.phase.is_connected:
                await changed.wait()
                continue
            error = error or LinkError(f"{self.peer}: no answer yet")
            down_since = self.outage.since_s if self.outage is not None else begun
            left = max(begun, down_since) + grace_s - trio.current_time()
            if left <= 0 or (not error.retryable and self.outage is not outage):
                raise PitfsError(str(error)) from error
            with trio.move_on_after(left):
                await changed.wait()
        if mark in self.lost_marks:
            raise InGapError(self.lost_cause)
        # Its difference journal follows at once. Whoever waits for a snapshot goes on to look at what lies before it.
        while (
            self.first_pass_mark < mark == self.committed.mark
            and self.phase.is_connected
            and self.link_error is None
        ):
            await self.changed.wait()
