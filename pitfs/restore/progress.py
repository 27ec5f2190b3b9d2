"""How long work says how far it is: the caller passes down what shows it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

# (title, total bytes) -> a block in which the function is called with each number of bytes done.
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
