"""`pitfs status`: where a side stands."""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import TYPE_CHECKING, Any, Final

from pitfs.errors import UsageError
from pitfs.model.position import format_instant

if TYPE_CHECKING:
    from pitfs.store.store import Store

NAME: Final = "status"


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        NAME,
        help="where a side stands: lag, journal use, rate, last decision",
        description="Says where a group stands: the production side for a CONFIG (asks the running 'pitfs "
        "protect'), the replica for a STORE.",
        epilog="examples:\n  pitfs status /etc/pitfs/db1.toml\n  pitfs status /srv/pitfs/db1 --json",
    )
    parser.add_argument(
        "target", metavar="CONFIG|STORE", help="TOML file of a group, or directory of a store"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    if os.path.isdir(args.target):
        status = _replica(args.target)
    elif os.path.exists(args.target):
        status = _production(args.target)
    else:
        raise UsageError(f"{args.target}: no such file or directory: give a configuration or a store")
    if args.json:
        print(json.dumps(status))
    else:
        _print(status)
    return 0


def _production(path: str) -> dict[str, Any]:
    from pitfs.cli.asking import ask
    from pitfs.config.production import load_config
    from pitfs.replication.requests import ReadStatus

    return ask(load_config(path), ReadStatus())


def _replica(path: str) -> dict[str, Any]:
    from pitfs.cli.holding import holder_rows
    from pitfs.store.store import Store

    store = Store.open(path)
    try:
        latest = store.latest()
        protected = store.protected_through_ns() if latest else None
        interval = None
        if latest is not None:
            for interval in (*store.intervals(latest.time_ns, None), *store.open_intervals()):  # noqa: B007 — the last one
                pass
        decision = None
        if interval is not None:
            decision = {
                "granularity_ns": interval.granularity_ns,
                "reason": interval.cause or "every write arrived",
            }
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
            "holders": holder_rows(path),
            "seq": latest.seq if latest else None,
            "last_gap": _last_gap(store),
        }
    finally:
        store.close()


def _last_gap(store: Store) -> dict[str, str] | None:
    gap = store.last_gap()
    if gap is None:
        return None
    return {"from": format_instant(gap.from_time_ns), "to": format_instant(gap.to_time_ns), "cause": gap.cause}


def _print(status: dict[str, Any]) -> None:
    """A line for each thing that stands; bytes with their unit."""
    from pitfs.cli.holding import holder_text
    from pitfs.cli.list import granularity_text

    for key, value in status.items():
        if value is None or value == []:
            continue
        if key == "holders":
            for row in value:
                print(f"{'holder':<26}{holder_text(row)}")
            continue
        if key == "last_decision":
            what = granularity_text(value["granularity_ns"])
            value = f"{what}: {value['reason']}"
        if key == "last_gap":
            value = f"{value['from']} -> {value['to']}: {value['cause']}"
        print(f"{key.replace('_', ' '):<26}{value}")
