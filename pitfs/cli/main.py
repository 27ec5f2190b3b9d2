"""The frame of the `pitfs` command: finds the command, runs it, turns what went wrong into one line.

Each command is a module of this package (or an object in one). Only the chosen one is imported, and it imports in
`run` what is large: `pitfs list` must not pay for FUSE and TLS.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any, Final, Protocol

from pitfs import __version__
from pitfs.cli.common.parser import Parser
from pitfs.errors import PitfsError
from pitfs.supervision.report import fill_standard_descriptors, report

# Name of each command: its module, its summary. In the order in which --help lists them.
COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "protect": ("pitfs.cli.protect", "serve the volumes of a configuration and replicate every write"),
    "snapshot": ("pitfs.cli.snapshot", "close the interval now and wait until the replica has it"),
    "bookmark": ("pitfs.cli.bookmark", "name the position of now"),
    "status": ("pitfs.cli.status", "where a side stands: lag, journal use, rate, last decision"),
    "receive": ("pitfs.cli.receive", "take what production hosts send into stores"),
    "list": ("pitfs.cli.list", "snapshots, intervals, bookmarks and gaps of a store"),
    "resolve": ("pitfs.cli.resolve", "the instant that a time leads to"),
    "digest": ("pitfs.cli.digest", "checksum of a volume at an instant"),
    "verify": ("pitfs.cli.verify", "compare volumes with the digests that production took"),
    "diff": ("pitfs.cli.diff", "what differs between two instants of a volume"),
    "export": ("pitfs.cli.export", "write a volume at an instant to a file or device"),
    "attach": ("pitfs.cli.attach", "a volume at an instant as a block device"),
    "detach": ("pitfs.cli.detach", "undo what attach did for a device"),
    "drill": ("pitfs.cli.drill", "prove that a random instant can be used"),
    "bisect": ("pitfs.cli.bisect", "find the write that broke something"),
    "serve-nbd": ("pitfs.cli.serve_nbd", "serve a store's instants to NBD clients"),
    "check": ("pitfs.cli.check", "verify a store, and say which instants suffer from damage"),
    "retention": ("pitfs.cli.retention", "what a store keeps, and up to which age"),
    "prune": ("pitfs.cli.prune", "apply a store's retention policy now"),
}


class Command(Protocol):
    """What a command's module has: two texts for --help, and what main calls."""

    DESCRIPTION: str
    EXAMPLES: str

    def add_arguments(self, parser: argparse.ArgumentParser, /) -> None: ...
    def run(self, args: argparse.Namespace, /) -> int: ...


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `pitfs`; returns the exit code: 0 done, 1 failed, 2 wrong use."""
    fill_standard_descriptors()
    arguments = list(sys.argv[1:] if argv is None else argv)
    verbose = False
    try:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold any bytes
        name = next((argument for argument in arguments if not argument.startswith("-")), None)
        parser, commands = build_parser([name] if name in COMMANDS else [])
        args = parser.parse_args(arguments)
        verbose = bool(args.verbose)
        _set_up_logging(args.verbose)
        code = commands[args.command].run(args)
        sys.stdout.flush()  # here, where a full disk or a closed pipe can still be reported
        return code
    except BaseException as error:
        return report(error, verbose=verbose)


def build_parser(names: Sequence[str]) -> tuple[Parser, dict[str, Command]]:
    """The parser with these commands complete and the others as a line of help only."""
    parser = Parser(
        prog="pitfs",
        description="Replicates block volumes and gives back any instant of them.",
        epilog="pitfs COMMAND --help says more, with examples. mount.pitfs STORE MOUNTPOINT mounts a store.",
    )
    _add_verbose(parser, default=0)
    parser.add_argument("--version", action="version", version=f"pitfs {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", required=True)
    commands = {}
    for name, (place, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary)
        if name in names:
            commands[name] = command = _load(name, place)
            subparser.description, subparser.epilog = command.DESCRIPTION, command.EXAMPLES
            command.add_arguments(subparser)
            _add_verbose(subparser, default=argparse.SUPPRESS)
    return parser, commands


def full_parser() -> argparse.ArgumentParser:
    """The parser with all commands complete, for man pages and shell completion."""
    return build_parser(list(COMMANDS))[0]


def _load(name: str, place: str) -> Command:
    module_name, _, attribute = place.partition(":")
    try:
        module: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise PitfsError(f"{name}: the installation is incomplete: {error}: run tools/setup again") from error
    command: Command = getattr(module, attribute) if attribute else module
    return command


def _add_verbose(parser: argparse.ArgumentParser, default: Any) -> None:
    meaning = "say more on standard error; twice: everything"
    parser.add_argument("-v", "--verbose", action="count", default=default, help=meaning)


def _set_up_logging(verbose: int) -> None:
    if not verbose and "logging" not in sys.modules:
        return  # it takes 10 ms; a warning logged later reaches standard error all the same
    import logging

    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(level=level, stream=sys.stderr, format="pitfs: %(levelname)s: %(message)s")


if __name__ == "__main__":
    sys.exit(main())
