"""Commands of the contract that this version doesn't have yet: they say so instead of being unknown."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any, Never

from pitfs.errors import NotAvailableError


@dataclass(frozen=True, slots=True)
class LaterCommand:
    NAME: str
    summary: str
    options: tuple[tuple[str, str], ...]
    instead: str

    def add_parser(self, subparsers: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = subparsers.add_parser(
            self.NAME,
            help=f"{self.summary} (not available in this version)",
            description=f"Will {self.summary}. Not available in this version yet.",
            epilog=f"example:\n  pitfs {self.NAME} /srv/replica/db1 {self.options[0][0]}",
        )
        parser.add_argument("store", metavar="STORE", help="directory of the store")
        for option, meaning in self.options:
            parser.add_argument(option, action="store_true", help=meaning)
        return parser

    def run(self, args: argparse.Namespace) -> Never:
        raise NotAvailableError(
            f"{self.NAME} {args.store}: not available in this version yet: {self.instead}"
        )


check = LaterCommand(
    "check",
    "verify a store",
    (
        ("--data", "reread every block"),
        ("--rebuild", "make the catalog again from the objects"),
    ),
    "every read verifies its blocks; pitfs digest or pitfs export --verify rereads a whole volume",
)
prune = LaterCommand(
    "prune",
    "apply the retention policy",
    (("--dry-run", "say what would go, remove nothing"),),
    "the store keeps everything",
)
