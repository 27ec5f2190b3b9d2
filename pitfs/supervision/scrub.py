"""The receiver checks its stores by itself: each once a month, contents too, at a modest rate."""

from __future__ import annotations

import glob
import logging
import os
import time
from typing import Final

import trio

from pitfs.model.units import counted

log = logging.getLogger(__name__)

EVERY_S: Final = 30 * 86_400.0
LOOK_S: Final = 3_600.0
RATE: Final = 32 << 20  # a TiB takes 9 hours


async def scrub_stores(root: str) -> None:
    """For ever. A store's first time is a month after it was made; one that was cut off goes on."""
    while True:
        await trio.sleep(LOOK_S)
        for store_json in sorted(glob.glob(os.path.join(glob.escape(root), "*", "store.json"))):
            # Whatever it reads, a kill is safe at any point: the receiver's end doesn't wait for it.
            await trio.to_thread.run_sync(scrub_if_due, os.path.dirname(store_json), abandon_on_cancel=True)


def scrub_if_due(store: str) -> None:
    """Checks a store if its last check is a month old; the log has the outcome, an error is no more than that."""
    from pitfs.store.check.check import check
    from pitfs.store.check.progress import Progress, at_rate

    try:
        last = Progress.read(store, has_data=True)
        made_ns = os.stat(os.path.join(store, "store.json")).st_mtime_ns
        if not last.is_under_way and time.time_ns() - max(last.finished_ns, made_ns) < EVERY_S * 10**9:
            return
        report = check(store, True, at_rate(RATE))
    except Exception as error:  # whatever it is, the receiver goes on
        log.warning("%s: the monthly check failed, it is tried again in an hour: %s", store, error)
        return
    found = counted(len(report.damaged) or "no", "damaged place")
    said = "%s: monthly check of %d objects, %d bytes: %s%s", store, report.objects, report.bytes, found
    if report.damaged:
        log.error(*said, ": pitfs check says which instants suffer")
    else:
        log.info(*said, "")
