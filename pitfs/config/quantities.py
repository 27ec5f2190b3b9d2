"""Numbers with units, and the limits of those that a user may choose.

All units are SI unless they say "i" (KiB = 1024):

    duration  "500ms" "60s" "5m" "1h" "1d"                           -> nanoseconds
    rate      "100Mbit" "1Gbit" "12.5MB" "4MiB", with or without /s  -> bytes per second
    size      "10GiB" "500MB" or a plain integer of bytes            -> bytes
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from pitfs.model.window import check_window

_NUMBER: Final = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?) ?([A-Za-z]+)")
_DURATIONS: Final = {
    "ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "min": 60 * 10**9, "h": 3600 * 10**9,
    "d": 86400 * 10**9,
}  # fmt: skip
_SIZES: Final = {
    "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
_BITS: Final = {"bit": 1, "kbit": 10**3, "Kbit": 10**3, "Mbit": 10**6, "Gbit": 10**9, "Tbit": 10**12}
_RATES: Final = _SIZES | {unit: Fraction(bits, 8) for unit, bits in _BITS.items()}


@dataclass(frozen=True, slots=True)
class Quantity:
    """A kind of quantity, and its limits.

    Attributes:
        units: what one of each unit is in nanoseconds, bytes or bytes per second.
        example: for messages.
        limits: the least and the most, written as a user would; "" for none.
        check: raises ValueError for a number that is out of other limits; says what it must be.
        hint: what else the message about limits says.
        without_unit: an integer is good too.
        per_second: "/s" may stand behind the unit.
    """

    units: Mapping[str, int | Fraction]
    example: str
    limits: tuple[str, str] | None = None
    check: Callable[[int], None] | None = None
    hint: str = ""
    without_unit: bool = False
    per_second: bool = False

    def parse(self, given: str | int) -> int:
        """The quantity, rounded down to whole nanoseconds or bytes.

        Raises:
            ValueError: it isn't one, or is out of the limits; the message is for the user.
        """
        value = given if isinstance(given, int) else self._parse_text(given)
        if self.limits is not None:
            low, high = self.limits
            if not self._parse_text(low) <= value <= self._parse_text(high):
                raise ValueError(f"{given!r}: must be {low} to {high}{self.hint}")
        if self.check is not None:
            try:
                self.check(value)
            except ValueError as error:
                raise ValueError(f"{given!r}: {error}") from None
        return value

    def _parse_text(self, text: str) -> int:
        match = _NUMBER.fullmatch(text.removesuffix("/s") if self.per_second else text)
        if match is None or match[2] not in self.units:
            words = f"isn't a number with one of {', '.join(self.units)}, as {self.example}"
            raise ValueError(f"{shorten(text)} {words}")
        return int(Fraction(match[1]) * self.units[match[2]])


INTERVAL: Final = Quantity(
    _DURATIONS,
    '"60s"',
    # Closing an interval costs some ms and two fsyncs on the replica; the journal holds all of it until it is shipped.
    limits=("100ms", "24h"),
)
TIMEOUT: Final = Quantity(_DURATIONS, '"1h"', limits=("1s", "30d"))
RATE: Final = Quantity(
    _RATES,
    '"100Mbit" or "12.5MB"',
    limits=("64kbit", "8000Tbit"),  # below, one frame outlives every time-out
    hint="; without rate there is no cap",
    per_second=True,
)
CAPACITY: Final = Quantity(
    _SIZES,
    '"10GiB"',
    limits=("16MiB", "1048576TiB"),  # a few segments: below, every burst overflows
    without_unit=True,
)
WINDOW: Final = Quantity(_SIZES, '"32MiB"', check=check_window, without_unit=True)
SIZE: Final = Quantity(_SIZES, '"10GiB"', without_unit=True)


def shorten(value: str) -> str:
    """A value as it is shown in a message."""
    return repr(value if len(value) <= 80 else value[:77] + "…")


def parse_size(text: str) -> int:
    """A size in bytes from the command line, where a plain number of bytes is text too.

    Raises:
        ValueError: it isn't one; the message is for the user.
    """
    return SIZE.parse(int(text) if text.isascii() and text.isdigit() else text)
