"""Quantities for people: three digits and the unit that fits. Exact ones stand in JSON. Pure."""

from __future__ import annotations

from typing import Final

_BYTES: Final = ("B", "kB", "MB", "GB", "TB", "PB")
_DURATIONS: Final = ((86_400, 48 * 3600, "days"), (3600, 2 * 3600, "h"), (60, 120, "min"))  # unit, from, name


def format_bytes(size_bytes: float) -> str:
    """As "1.23 MB"; a rate too, before "/s"."""
    value, units = float(size_bytes), list(_BYTES)
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} {units[0]}" if value >= 100 else f"{value:.3g} {units[0]}"


def format_seconds(seconds: float) -> str:
    """As "1.2 s", "14 min", "3 h" or "4 days"."""
    for unit, least, name in _DURATIONS:
        if seconds >= least:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.1f} s"


def counted(count: int | str, noun: str) -> str:
    """As "1 snapshot", "2 snapshots" or "no snapshots"."""
    return f"{count} {noun}{'s' * (count != 1)}"
