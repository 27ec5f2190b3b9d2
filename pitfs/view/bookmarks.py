"""Bookmarks as a directory that is read in parts, and may grow meanwhile.

A reader continues from a cookie of 63 bits. A count would be wrong as soon as a bookmark came whose name sorts before,
and a name does not fit. So a cookie is the second of the bookmark's position, from which the catalog continues, and
within that second a number that depends on the name:

    bits 29..62  second since 1970
    bits  0..28  number: hash of the name, 28 bits, + 1; where that is taken, the next one that is free

Within a second bookmarks come in the order of these numbers. A new one changes no other's number unless their
hashes touch, which has a chance of one in thousands even among a hundred thousand in the same second.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from typing import Final

from xxhash import xxh3_64_intdigest

from pitfs.model.position import SECOND_NS
from pitfs.model.transfer import Bookmark
from pitfs.store.store import Store

NUMBER_BITS: Final = 29
HASH_MASK: Final = (1 << 28) - 1
MAX_RUN: Final = 64  # numbers in a row that are taken; among a million names in one second they are 3 or 4
MAX_PAGE: Final = 4096  # bookmarks of one second held at once, some 300 bytes each


def bookmarks_behind(store: Store, cookie: int) -> Iterator[tuple[Bookmark, int]]:
    """(bookmark, its cookie), ascending by cookie, from the first that is larger than `cookie` on (0: all)."""
    while True:
        from_second, number = divmod(cookie, 1 << NUMBER_BITS)
        bookmarks = store.bookmarks(from_second * SECOND_NS)
        for second, group in itertools.groupby(bookmarks, lambda each: each.time_ns // SECOND_NS):
            # A number depends on the names before it only through a run of taken numbers.
            low = number - MAX_RUN if second == from_second else 0
            hashed = ((xxh3_64_intdigest(each.name.encode()) & HASH_MASK, each.name, each) for each in group)
            page = heapq.nsmallest(MAX_PAGE, (each for each in hashed if each[0] >= low))
            this = base = second << NUMBER_BITS
            for place, _, bookmark in page:
                this = max(this, base + place) + 1
                if this > cookie:
                    yield bookmark, this
            if len(page) == MAX_PAGE:  # the second may have more
                cookie = this
                break
        else:
            return
