"""The extended attributes of an instant's directory and images: what the state is, and what is known around it."""

from __future__ import annotations

from pitfs.model.position import format_instant
from pitfs.store.store import Resolution, Store


def extended_attributes(store: Store, resolution: Resolution) -> dict[bytes, bytes]:
    """Name -> value; names and values are the contract.

    `user.pitfs.gap` is there where a gap begins or ends at the state: its bounds and cause, a line for each.
    """
    granularity = resolution.granularity_ns
    attributes = {
        b"user.pitfs.seq": b"%d" % resolution.seq,
        b"user.pitfs.time": format_instant(resolution.time_ns).encode(),
        b"user.pitfs.kind": resolution.kind.encode(),
        b"user.pitfs.granularity": b"null" if granularity is None else b"%d" % granularity,
    }
    gaps = [
        f"{format_instant(gap.from_time_ns)} -> {format_instant(gap.to_time_ns)}: {gap.cause}"
        for gap in store.gaps(resolution.time_ns, resolution.time_ns + 1)
    ]
    if gaps:
        attributes[b"user.pitfs.gap"] = "\n".join(gaps).encode()
    return attributes
