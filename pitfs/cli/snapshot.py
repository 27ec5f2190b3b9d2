"""`pitfs snapshot`: closes the interval now and waits until the replica has it."""

from __future__ import annotations

import argparse
import json
from typing import Any, Final

from pitfs.cli.asking import ask
from pitfs.config.production import load_config
from pitfs.replication.requests import TakeSnapshot

NAME: Final = "snapshot"


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        NAME,
        help="close the interval now and wait until the replica has it",
        description="Closes the interval at the last write, returns when the replica has acknowledged it, and "
        "prints the snapshot's canonical instant: the time of the last write in it.",
        epilog="example:\n  pitfs snapshot /etc/pitfs/db1.toml",
    )
    parser.add_argument("config", metavar="CONFIG", help="TOML file of the group")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    reply = ask(load_config(args.config), TakeSnapshot())
    print(json.dumps(reply) if args.json else reply["instant"])
    return 0
