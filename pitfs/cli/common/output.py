"""How commands print what they found: JSON documents, and the words for what several commands show."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

from pitfs.model.position import format_instant
from pitfs.model.units import format_seconds

if TYPE_CHECKING:
    from pitfs.model.transfer import Bookmark, Gap
    from pitfs.store.catalog.records import Interval, Resolution, Snapshot


SILENT_S: Final = 180.0  # three intervals, unless they are set longer: then a replica should have heard something


def silence(age_s: float) -> str:
    """What a replica can say of production when nothing has arrived: it doesn't know which of these it is."""
    return (
        f"nothing has arrived for {format_seconds(age_s)}: production stopped, the link is down, intervals are long or "
        "writes bypass the journal: pitfs status CONFIG says it there"
    )


def print_json(document: object, indent: int | None = 2) -> None:
    import json  # 3 ms that mount.pitfs, which only warns, doesn't pay

    print(json.dumps(document, indent=indent))


def warn(text: str) -> None:
    """A line on standard error, for the user of a command."""
    print(f"pitfs: {text}", file=sys.stderr)


def write_json(members: Iterable[tuple[str, Any]]) -> None:
    """Prints one JSON document. A value that is an iterator is written as a list, row by row, and never held."""
    import msgspec  # 10 times as fast as json, and what reads stores has it loaded

    encode, write = msgspec.json.encode, sys.stdout.write
    separator = "{"
    for name, value in members:
        write(f'{separator}"{name}": ')
        separator = ",\n "
        if not isinstance(value, Iterator):
            write(encode(value).decode())
            continue
        between = "[\n  "
        for row in value:
            write(between + encode(row).decode())
            between = ",\n  "
        write("]" if between.startswith(",") else "[]")
    write("}\n")


def state_row(state: Snapshot | Bookmark | Resolution) -> dict[str, Any]:
    """Its instant and seq."""
    return {"instant": format_instant(state.time_ns), "seq": state.seq}


def span_row(span: Gap | Interval) -> dict[str, Any]:
    """Its bounds and cause."""
    return {"from": format_instant(span.from_time_ns), "to": format_instant(span.to_time_ns), "cause": span.cause}


def span_text(row: dict[str, Any]) -> str:
    """The bounds of a row that `span_row` made."""
    return f"{row['from']} -> {row['to']}"


def granularity_text(granularity_ns: int | None) -> str:
    if granularity_ns is None:
        return "snapshots only"
    if granularity_ns == 0:
        return "every write"
    unit_ns, unit = (10**9, "s") if granularity_ns >= 10**9 else (10**6, "ms")  # a rung is whole in one of them
    return f"every {granularity_ns // unit_ns} {unit}"
