"""What a user may type for a time -> the state that it leads to."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

from pitfs.model.position import AtSeq, parse_time

if TYPE_CHECKING:
    from pitfs.store.store import Resolution, Store


def resolve_time(
    store: Store, text: str, now_ns: int, zone: datetime.tzinfo = datetime.UTC
) -> tuple[Resolution, bool]:
    """The newest reachable state not after what `text` says, and whether it is exactly the state then.

    Raises:
        NotATimeError: it's no way to say a time.
        NoSuchInstantError: no state answers to it.
    """
    wanted = parse_time(text, now_ns=now_ns, zone=zone)
    if isinstance(wanted, AtSeq):
        resolution = store.at_seq(wanted.seq)
        return resolution, resolution.seq == wanted.seq
    return store.at_time(wanted.time_ns)
