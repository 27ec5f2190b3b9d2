"""Commands of the contract that this version does not have yet: they say so instead of being unknown."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Never

from pitfs.cli.common.parser import add_store
from pitfs.errors import NotAvailableError


@dataclass(slots=True)
class UnavailableCommand:
    """A command that only parses its arguments.

    Attributes:
        options: each with its help.
        instead: what the user can do now.
    """

    DESCRIPTION: str
    EXAMPLES: str
    options: dict[str, str]
    instead: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_store(parser)
        for option, meaning in self.options.items():
            parser.add_argument(option, action="store_true", help=meaning)

    def run(self, args: argparse.Namespace) -> Never:
        raise NotAvailableError(f"{args.command} {args.store}: not available in this version yet: {self.instead}")


prune = UnavailableCommand(
    "Will apply the retention policy. Not available in this version yet.",
    "example:\n  pitfs prune /srv/pitfs/db1 --dry-run",
    {"--dry-run": "say what would go, remove nothing"},
    "the store keeps everything",
)
