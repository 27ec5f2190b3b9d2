"""How commands print what they found: JSON documents, and the words for what several commands show."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from pitfs.model.position import format_instant

if TYPE_CHECKING:
    from pitfs.model.transfer import Gap
    from pitfs.store.catalog.records import Interval


def print_json(document: object, indent: int | None = 2) -> None:
    print(json.dumps(document, indent=indent))


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
    for unit_ns, unit in ((10**9, "s"), (10**6, "ms"), (10**3, "µs")):
        if granularity_ns % unit_ns == 0:
            return f"every {granularity_ns // unit_ns} {unit}"
    return f"every {granularity_ns} ns"
