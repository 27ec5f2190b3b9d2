"""`pitfs status`: where a side stands."""

from __future__ import annotations

import argparse
import contextlib
import os
import stat
import time
from typing import Any, Final

from pitfs.cli.common.output import SILENT_S, granularity_text, print_json, silence, span_row, span_text
from pitfs.cli.common.parser import add_json
from pitfs.errors import PermissionDeniedError, UsageError
from pitfs.model.position import format_instant
from pitfs.model.units import format_bytes, format_seconds

DESCRIPTION: Final = (
    "Says where a group stands: the production side for a CONFIG (asks the running 'pitfs "
    "protect'), the replica for a STORE."
)
EXAMPLES: Final = "examples:\n  pitfs status /etc/pitfs/db1.toml\n  pitfs status /srv/pitfs/db1 --json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="CONFIG|STORE", help="TOML file of a group, or directory of a store")
    add_json(parser, "one JSON document: man 7 pitfs explains its keys")


def run(args: argparse.Namespace) -> int:
    try:
        is_store = stat.S_ISDIR(os.stat(args.target).st_mode)
    except PermissionError:
        raise PermissionDeniedError(args.target) from None
    except (OSError, ValueError):
        raise UsageError(f"{args.target}: no such file or directory: give a configuration or a store") from None
    if is_store:
        status = _replica(args.target)
    else:
        from pitfs.cli.common.shipper import ask_shipper
        from pitfs.replication.control.requests import ReadStatus

        status = ask_shipper(args.target, ReadStatus())
    if args.json:
        print_json(status, indent=None)
    else:
        _print(status)
    return 0


def _replica(path: str) -> dict[str, Any]:
    from pitfs.cli.common.pins import pin_rows
    from pitfs.store.store import Store

    with contextlib.closing(Store.open(path)) as store:
        latest, gap = store.latest(), store.last_gap()
        protected = store.protected_through_ns() if latest else None
        decision = None
        if latest is not None:
            for interval in (*store.intervals(latest.time_ns, None), *store.open_intervals()):  # the last one counts
                reason = interval.cause or "every write arrived"
                decision = {"granularity_ns": interval.granularity_ns, "reason": reason}
        return {
            "role": "replica",
            "group": store.group,
            "protected_through": format_instant(protected) if protected else None,
            "lag_bytes": None,
            "lag_seconds": round(max(0, time.time_ns() - protected) / 1e9, 3) if protected else None,
            "journal_bytes": None,
            "journal_capacity_bytes": None,
            "rate_bytes_per_s": None,
            "last_decision": decision,
            "holders": pin_rows(path),
            "damaged": len(store.objects.damage.known()),
            "seq": latest.seq if latest else None,
            "last_gap": span_row(gap) if gap else None,
            "pruned_before": format_instant(pruned_ns) if (pruned_ns := store.meta("pruned_before_ns")) else None,
            "any_instant_from": format_instant(store.any_instant_from_ns()) if latest else None,
        }


def _print(status: dict[str, Any]) -> None:
    """A line for each value that is known."""
    from pitfs.cli.common.pins import pin_text

    for key, value in status.items():
        if key == "damaged" and value:
            value = f"{value} place{'s' * (value > 1)}: pitfs check STORE says which instants suffer, and what to do"
        if key == "holders":
            for row in value or ():
                print(f"{'holder':<26}{pin_text(row)}")
            continue
        if value is None or value == [] or (key == "damaged" and not value):
            continue
        if key.endswith(("_bytes", "_bytes_per_s")):
            value = format_bytes(value) + ("/s" if key.endswith("_s") else "")
        if key.endswith("_seconds"):
            value = format_seconds(value)
        if key == "last_decision":
            value = f"{granularity_text(value['granularity_ns'])}: {value['reason']}"
        if key == "last_gap":
            value = f"{span_text(value)}: {value['cause']}"
        print(f"{key.removesuffix('_bytes_per_s').replace('_', ' '):<26}{value}")
    if status["role"] == "replica" and (lag_s := status["lag_seconds"]) is not None and lag_s > SILENT_S:
        print(f"{'note':<26}{silence(lag_s)}")
