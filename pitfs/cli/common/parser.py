"""The argument parser of all programs, and the arguments that several commands have."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Never

from pitfs.errors import EXIT_USAGE, UsageError
from pitfs.supervision.report import fill_standard_descriptors, one_line, report

if TYPE_CHECKING:
    from pitfs.link.transport.tls import LinkContext

TLS_OPTIONS: Final = ("certificate", "key", "authority")
TIME_HELP: Final = (
    "any time that the mount understands: an instant, RFC 3339 or ISO 8601, @EPOCH, seq-N, 5m-ago; "
    "also latest, or a bookmark's name (or bookmarks/NAME)"
)


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, help that keeps its line breaks, and no abbreviated options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> Never:
        self.exit(EXIT_USAGE, f"{one_line(f'{self.prog}: {message}')}; see {self.prog} --help\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        if file is sys.stdout and file is not None:
            file.write(message)  # argparse swallows errors: help into a full disk would look complete
        else:
            super()._print_message(message, file)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            import difflib  # 3 ms that only this case pays

            close = difflib.get_close_matches(str(value)[:64], action.choices, 1)
            hint = f" (did you mean '{close[0]}'?)" if close else ""
            raise argparse.ArgumentError(None, f"unknown command '{value}'{hint}")
        super()._check_value(action, value)


def parse(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace | int:
    """The arguments; an exit code where argparse has printed help or an error."""
    try:
        return parser.parse_args(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else EXIT_USAGE


def run_helper(parser: Parser, run: Callable[[argparse.Namespace], int], argv: Sequence[str] | None) -> int:
    """Runs a helper of mount(8) or umount(8); returns its exit code."""
    fill_standard_descriptors()
    try:
        args = parse(parser, argv)
        return args if isinstance(args, int) else run(args)
    except BaseException as error:
        return report(error, program=parser.prog)


def add_store(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    parser.add_argument("store", metavar="STORE", nargs=nargs, help="directory of the store")


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="TOML file of the group")


def add_time(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    parser.add_argument("time", metavar="TIME", nargs=nargs, help=TIME_HELP)
    add_zone(parser)


def add_zone(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tz", metavar="ZONE", default="UTC", help="zone of times without one (default UTC)")


def add_volume(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    parser.add_argument("volume", metavar="VOLUME", nargs=nargs, help="name of the volume")


def add_json(parser: argparse.ArgumentParser, keys: str = "print one JSON document") -> None:
    """`--json`; `keys` are those of the document, where they are few."""
    parser.add_argument("--json", action="store_true", help=keys)


def add_tls_files(parser: argparse.ArgumentParser, peers: str) -> None:
    """The options; `peers` are those who connect."""
    meanings = "this host's certificate", "its key", f"the authority whose certificates {peers} show"
    for option, meaning in zip(TLS_OPTIONS, meanings, strict=True):
        parser.add_argument(f"--{option}", metavar="FILE", help=f"PEM file of {meaning}")


def given_tls_files(args: argparse.Namespace) -> list[str]:
    """Those of these options that were given."""
    return [f"--{option}" for option in TLS_OPTIONS if getattr(args, option) is not None]


def tls_context(args: argparse.Namespace, otherwise: str) -> LinkContext:
    """The context of all three files.

    Args:
        otherwise: what the user may do instead, for the error.

    Raises:
        UsageError: a file is missing or invalid.
    """
    from pitfs.link.transport.tls import server_context

    missing = ", ".join(f"--{option}" for option in TLS_OPTIONS if getattr(args, option) is None)
    if missing:
        raise UsageError(f"{missing} missing: give all three files, or {otherwise}")
    return server_context(args.certificate, args.key, args.authority)
