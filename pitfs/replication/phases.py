"""What the shipper of a group is doing: the phases, and which may follow which."""

from __future__ import annotations

import enum
from typing import Final


class Phase(enum.Enum):
    """A shipper has one connection at a time, and on it one phase at a time:

        DISCONNECTED ──> CONNECTING ──> LOCATING ─────────────────┐
             ^                             │                      v
             │ from every phase            v                AWAITING_COPY <──> BACKFILLING
             │ in which the         ┌──> WAITING ────────────> ^    │
             │ connection fails     │     ^   │                │    v
             │                      │     │   └────────────────┼──> FULL_SYNC
                                    │     └────────────────────┼────┘
             SHIPPING_INTERVAL <────┤──────────────────────────┤ damage, or a copy follows
             STREAMING <────────────┤──────────────────────────┘
             BACKFILLING <──────────┘

    DISCONNECTED       waits until the next attempt is due; marks are set, writes are journalled
    CONNECTING         TCP, TLS and greeting are under way
    LOCATING           looks for the place in the journal behind which the replica lacks everything
    WAITING            ships by intervals, and has none to ship: follows the journal to the next mark
    SHIPPING_INTERVAL  a snapshot diff is under way
    BACKFILLING        layers of a difference journal are under way, or being built; the phase before follows
    STREAMING          the open interval's writes go as they come; layers go in between
    AWAITING_COPY      nothing that the journal has before the next COPY_START can be used: the replica has no state,
                       or the journal doesn't lead on from the replica's; follows the journal to that COPY_START
    FULL_SYNC          a copy, complete or of what changed, is under way
    """

    DISCONNECTED = enum.auto()
    CONNECTING = enum.auto()
    LOCATING = enum.auto()
    WAITING = enum.auto()
    SHIPPING_INTERVAL = enum.auto()
    BACKFILLING = enum.auto()
    STREAMING = enum.auto()
    AWAITING_COPY = enum.auto()
    FULL_SYNC = enum.auto()

    @property
    def is_connected(self) -> bool:
        return self not in (Phase.DISCONNECTED, Phase.CONNECTING)


_P = Phase
TRANSITIONS: Final = {
    _P.DISCONNECTED: {_P.CONNECTING},
    _P.CONNECTING: {_P.LOCATING, _P.DISCONNECTED},
    _P.LOCATING: {_P.WAITING, _P.AWAITING_COPY, _P.DISCONNECTED},
    _P.WAITING: {
        _P.SHIPPING_INTERVAL, _P.BACKFILLING, _P.STREAMING, _P.AWAITING_COPY, _P.FULL_SYNC, _P.DISCONNECTED,
    },
    _P.SHIPPING_INTERVAL: {_P.WAITING, _P.AWAITING_COPY, _P.DISCONNECTED},
    _P.BACKFILLING: {_P.WAITING, _P.AWAITING_COPY, _P.DISCONNECTED},
    _P.STREAMING: {_P.WAITING, _P.AWAITING_COPY, _P.DISCONNECTED},
    _P.AWAITING_COPY: {_P.AWAITING_COPY, _P.BACKFILLING, _P.FULL_SYNC, _P.DISCONNECTED},
    _P.FULL_SYNC: {_P.WAITING, _P.DISCONNECTED},
}  # fmt: skip
