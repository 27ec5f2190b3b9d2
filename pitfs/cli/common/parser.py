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

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> Never:
        self.exit(EXIT_USAGE, f"{one_line(f'{self.prog}: {message}')}; see {self.prog} --help\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse, but all behind `--` goes to `words`, as it is, where there is a COMMAND."""
        if not any(action.dest == "words" for action in self._actions):
            return super().parse_known_args(args, namespace)
        end = args.index("--") if "--" in args else len(args)
        found, rest = super().parse_known_args(args[:end], namespace)
        rest, found.words = [*found.words, *rest], args[end + 1 :]
        return found, rest

    def _print_message(self, message: str, file: Any = None) -> None:
        if file is sys.stdout:
            file.write(message)  # argparse swallows errors: help into a full disk would look complete
            file.flush()
        else:
            super()._print_message(message, file)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            import difflib  # 3 ms that only this case pays

            close = difflib.get_close_matches(str(value)[:64], action.choices, 1)
            hint = f" (did you mean '{close[0]}'?)" if close else ""
            raise argparse.ArgumentError(None, f"unknown command '{value}'{hint}")
        super()._check_value(action, value)


def run_helper(parser: Parser, run: Callable[[argparse.Namespace], int], argv: Sequence[str] | None) -> int:
    """Runs a helper of mount(8) or umount(8); returns its exit code."""
    fill_standard_descriptors()
    try:
        return run(parser.parse_args(argv))
    except BaseException as error:
        return report(error, program=parser.prog)


def add_store(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    parser.add_argument("store", metavar="STORE", nargs=nargs, help="directory of the store")


def add_image(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    """STORE, TIME and VOLUME, all of them with `nargs`."""
    add_store(parser, nargs)
    add_time(parser, nargs)
    add_volume(parser, nargs)


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


def add_scratch_command(parser: argparse.ArgumentParser, meaning: str) -> None:
    """`words`: a COMMAND that gets a scratch device; and where what it writes goes."""
    parser.add_argument("words", metavar="-- COMMAND", nargs="*", help=f"{meaning}; its last argument is the device")
    meaning = "where what is written goes (default: a directory under /var/tmp)"
    parser.add_argument("--scratch-dir", metavar="DIR", help=meaning)


def add_tls_files(parser: argparse.ArgumentParser, peers: str) -> None:
    """The options; `peers` are those who connect."""
    meanings = "this host's certificate", "its key", f"the authority whose certificates {peers} show"
    for option, meaning in zip(TLS_OPTIONS, meanings, strict=True):
        parser.add_argument(f"--{option}", metavar="FILE", help=f"PEM file of {meaning}")


def server_tls(args: argparse.Namespace, insecure: bool | None, host: str | None) -> LinkContext | None:
    """The context of all three files; None without TLS.

    Args:
        insecure: whether the user wants no TLS; None where there is no option for it: wanted if no file is given.
        host: where it listens, None at a unix socket, which needs no TLS.

    Raises:
        UsageError: a file is missing or invalid, or there is no TLS beyond loopback.
    """
    from pitfs.link.transport.tls import require_loopback, server_context

    given = [option for option in TLS_OPTIONS if getattr(args, option) is not None]
    if insecure and given:
        raise UsageError(f"--insecure and --{given[0]} exclude each other")
    if insecure or (insecure is None and not given):
        if host is not None:
            require_loopback(host)
        return None
    missing = ", ".join(f"--{option}" for option in TLS_OPTIONS if option not in given)
    if missing:
        otherwise = "none, on loopback or a unix socket" if insecure is None else "--insecure on loopback"
        raise UsageError(f"{missing} missing: give all three files, or {otherwise}")
    return server_context(args.certificate, args.key, args.authority)
