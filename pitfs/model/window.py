"""The window of the link's codec: how far back its stream may refer. Pure; configuration and link hold to it."""

from __future__ import annotations

from typing import Final

MIN_WINDOW_BYTES: Final = 1 << 20  # less than a payload would help nothing
MAX_WINDOW_BYTES: Final = 128 << 20  # memory of each side; beyond it, traces of databases gained a tenth
DEFAULT_WINDOW_BYTES: Final = 32 << 20


def check_window(window_bytes: int) -> None:
    """
    Raises:
        ValueError: a window can't have that size; the message is for the user.
    """
    is_power = window_bytes & (window_bytes - 1) == 0
    if not is_power or not MIN_WINDOW_BYTES <= window_bytes <= MAX_WINDOW_BYTES:
        low, high = MIN_WINDOW_BYTES >> 20, MAX_WINDOW_BYTES >> 20
        raise ValueError(f"must be a power of two from {low}MiB to {high}MiB")
