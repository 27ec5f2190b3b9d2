"""Who holds what of a store: for the commands that read an instant, and those that show who does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from pitfs.model.position import format_instant

if TYPE_CHECKING:
    from pitfs.store.pins.pin_file import PinnedInstants
    from pitfs.store.pins.pins import Pins
    from pitfs.store.store import Store

MOUNT: Final = "mount "  # a holder that is one says so, and where
_SHOWN: Final = 3  # instants in a line of text


@contextlib.contextmanager
def open_held(path: str, what: str) -> Iterator[tuple[Store, Pins]]:
    """Opens a store to read instants of it, which are held from `Holder.pinned` to the end of the block.

    Args:
        what: who holds them, as `pitfs status` shows it.

    Raises:
        StoreError: it isn't one.
    """
    from pitfs.store.pins.pins import Pins
    from pitfs.store.store import Store

    store = Store.open(path)
    try:
        with Pins(path, what) as holder:
            yield store, holder
    finally:
        store.close()


def holder_rows(store: str) -> list[dict[str, Any]]:
    """The holders of a store, as `status --json` gives them."""
    from pitfs.store.pins.pins import held

    return [_row(each) for each in held(store)]


def _row(each: PinnedInstants) -> dict[str, Any]:
    from pitfs.fuse.attach.images import image_loops

    devices = []
    if each.what.startswith(MOUNT):
        devices = [
            {"device": image.loop.device, "instant": image.instant, "volume": image.volume}
            for image in image_loops()
            if image.mount is not None and image.mount.mountpoint == each.what.removeprefix(MOUNT)
        ]
    unlisted = each.unlisted and {
        "count": each.unlisted.count,
        "from": each.unlisted.least.instant,
        "to": each.unlisted.greatest.instant,
    }
    return {
        "pid": each.pid,
        "what": each.what,
        "since": format_instant(each.since_ns),
        "instants": [position.instant for position in each.instants],
        "unlisted": unlisted,
        "devices": devices,
    }


def holder_text(row: dict[str, Any]) -> str:
    """One line about a holder."""
    instants = row["instants"]
    parts = [", ".join(instants[:_SHOWN]) or "no instant now"]
    if len(instants) > _SHOWN:
        parts[0] += f" and {len(instants) - _SHOWN} more"
    if row["unlisted"]:
        parts.append(f"everything from {row['unlisted']['from']} to {row['unlisted']['to']}")
    parts += [f"{each['device']} over {each['instant']}/{each['volume']}" for each in row["devices"]]
    return f"{row['what']} (pid {row['pid']}): {'; '.join(parts)}"
