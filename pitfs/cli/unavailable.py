"""Commands of the contract that this version does not have yet: they say so instead of being unknown."""

from __future__ import annotations

import argparse
from typing import Never

from pitfs.cli.common.parser import add_store
from pitfs.errors import NotAvailableError


class UnavailableCommand:
    """A command that only parses its arguments.

    Args:
        options: each with its help.
        instead: what the user can do now.
    """

    def __init__(self, name: str, purpose: str, options: dict[str, str], instead: str) -> None:
        self.DESCRIPTION = f"Will {purpose}. Not available in this version yet."
        self.EXAMPLES = f"example:\n  pitfs {name} /srv/replica/db1 {next(iter(options))}"
        self._options = options
        self._instead = instead

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_store(parser)
        for option, meaning in self._options.items():
            parser.add_argument(option, action="store_true", help=meaning)

    def run(self, args: argparse.Namespace) -> Never:
        raise NotAvailableError(
            f"{args.command} {args.store}: not available in this version yet: {self._instead}"
        )


check = UnavailableCommand(
    "check",
    "verify a store",
    {"--data": "reread every block", "--rebuild": "make the catalog again from the objects"},
    "every read verifies its blocks; pitfs digest or pitfs export --verify rereads a whole volume",
)
prune = UnavailableCommand(
    "prune",
    "apply the retention policy",
    {"--dry-run": "say what would go, remove nothing"},
    "the store keeps everything",
)
