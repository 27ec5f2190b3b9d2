"""A cache with a limit that may be used from several threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Cache(Generic[K, V]):
    """Keeps what was used last, up to `limit` (in whatever `weight` counts, else values).

    The lock isn't held while a value is made: two threads may make the same one, which is harmless for values
    that don't change.
    """

    def __init__(self, limit: int, weight: Callable[[V], int] = lambda value: 1) -> None:
        self.limit = limit
        self._weight = weight
        self._total = 0
        self._values: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value of `key`, made if it isn't there; what `make` raises goes to the caller."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()
        with self._lock:
            if key not in self._values:
                self._values[key] = value
                self._total += self._weight(value)
            while self._total > self.limit and len(self._values) > 1:
                self._total -= self._weight(self._values.popitem(last=False)[1])
        return value
