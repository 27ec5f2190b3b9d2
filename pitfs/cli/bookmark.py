"""`pitfs bookmark`: names the position of now."""

from __future__ import annotations

import argparse
from typing import Final

from pitfs.cli.common.parser import add_config, add_json
from pitfs.cli.snapshot import print_instant
from pitfs.model.group import check_new_bookmark

DESCRIPTION: Final = (
    "Names the state after the last write and prints its canonical instant. The name appears on "
    "the replica, under bookmarks/, once that position is replicated."
)
EXAMPLES: Final = "example:\n  pitfs bookmark /etc/pitfs/db1.toml before-upgrade"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    meaning = "letters, digits, '.', '_' and '-', at most 64; nothing that reads as a time"
    parser.add_argument("name", metavar="NAME", help=meaning)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    check_new_bookmark(args.name)  # here too: it needs no shipper that runs
    from pitfs.replication.control.requests import SetBookmark

    return print_instant(args, SetBookmark(args.name))
