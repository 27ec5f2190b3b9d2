"""`pitfs bookmark`: names the position of now."""

from __future__ import annotations

import argparse
import json
from typing import Any, Final

from pitfs.cli.asking import ask
from pitfs.config.production import load_config
from pitfs.errors import UsageError
from pitfs.model.group import NAME_RULE, is_name
from pitfs.replication.requests import SetBookmark

NAME: Final = "bookmark"


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        NAME,
        help="name the position of now",
        description="Names the state after the last write and prints its canonical instant. The name appears on "
        "the replica, under bookmarks/, once that position is replicated.",
        epilog="example:\n  pitfs bookmark /etc/pitfs/db1.toml before-upgrade",
    )
    parser.add_argument("config", metavar="CONFIG", help="TOML file of the group")
    parser.add_argument("name", metavar="NAME", help="letters, digits, '.', '_' and '-', at most 64")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    if not is_name(args.name):
        raise UsageError(f"{args.name}: not a name for a bookmark: must be {NAME_RULE}")
    reply = ask(load_config(args.config), SetBookmark(args.name))
    print(json.dumps(reply) if args.json else reply["instant"])
    return 0
