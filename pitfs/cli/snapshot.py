"""`pitfs snapshot`: closes the interval now and waits until the replica has it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

from pitfs.cli.common.output import print_json
from pitfs.cli.common.parser import add_config, add_json

if TYPE_CHECKING:
    from pitfs.replication.control.requests import SetBookmark, TakeSnapshot

DESCRIPTION: Final = (
    "Closes the interval at the last write, returns when the replica has acknowledged it, and "
    "prints the snapshot's canonical instant: the time of the last write in it. While the link is down it waits 10 s "
    "for it, then fails: the snapshot is set all the same, and sent when the replica can be reached."
)
EXAMPLES: Final = "example:\n  pitfs snapshot /etc/pitfs/db1.toml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from pitfs.replication.control.requests import TakeSnapshot

    return print_instant(args, TakeSnapshot())


def print_instant(args: argparse.Namespace, request: TakeSnapshot | SetBookmark) -> int:
    """Sends the request and prints the instant that it returns."""
    from pitfs.cli.common.shipper import ask_shipper

    reply = ask_shipper(args.config, request)
    if args.json:
        print_json(reply, indent=None)
    else:
        print(reply["instant"])
    return 0
