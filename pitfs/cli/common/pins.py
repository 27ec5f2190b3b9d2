"""Who reads which instants of a store: commands pin what they read, and `pitfs status` shows all pins."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from pitfs.cli.common.times import resolve
from pitfs.model.position import format_instant

if TYPE_CHECKING:
    from pitfs.store.pins.pin_file import PinnedInstants
    from pitfs.store.pins.pins import Pins
    from pitfs.store.store import Resolution, Store

MOUNT: Final = "mount "  # what a mount calls itself begins so; its mountpoint follows
MAX_SHOWN: Final = 3  # instants in a line of text


@contextlib.contextmanager
def open_pinned(path: str, what: str) -> Iterator[tuple[Store, Pins]]:
    """Opens a store to read instants of it; pins hold to the end of the block.

    Args:
        what: who pins, as `pitfs status` shows it.

    Raises:
        StoreError: it is no store.
    """
    from pitfs.store.pins.pins import Pins
    from pitfs.store.store import Store

    with contextlib.closing(Store.open(path)) as store, Pins(path, what) as pins:
        yield store, pins


def pin(store: Store, pins: Pins, text: str, zone_name: str) -> Resolution:
    """Resolves TIME as `resolve` does, and pins the state."""
    return pins.pinned(store, resolve(store, text, zone_name)[0])


def pin_rows(store: str) -> list[dict[str, Any]]:
    """The readers of a store, as `status --json` gives them."""
    from pitfs.store.pins.pins import list_pins

    return [_row(each) for each in list_pins(store)]


def _row(reader: PinnedInstants) -> dict[str, Any]:
    from pitfs.fuse.attach.images import image_loops

    devices = [
        {"device": image.loop.device, "instant": image.instant, "volume": image.volume}
        for image in (image_loops() if reader.what.startswith(MOUNT) else ())
        if image.mount is not None and image.mount.mountpoint == reader.what.removeprefix(MOUNT)
    ]
    unlisted = reader.unlisted and {
        "count": reader.unlisted.count,
        "from": reader.unlisted.least.instant,
        "to": reader.unlisted.greatest.instant,
    }
    who = {"pid": reader.pid, "what": reader.what, "since": format_instant(reader.since_ns)}
    return who | {
        "instants": [position.instant for position in reader.instants],
        "unlisted": unlisted,
        "devices": devices,
    }


def pin_text(row: dict[str, Any]) -> str:
    """One line about a reader."""
    instants = row["instants"]
    parts = [", ".join(instants[:MAX_SHOWN]) or "no instant now"]
    if len(instants) > MAX_SHOWN:
        parts[0] += f" and {len(instants) - MAX_SHOWN} more"
    if row["unlisted"]:
        parts.append(f"everything from {row['unlisted']['from']} to {row['unlisted']['to']}")
    parts += [f"{each['device']} over {each['instant']}/{each['volume']}" for each in row["devices"]]
    return f"{row['what']} (pid {row['pid']}): {'; '.join(parts)}"
