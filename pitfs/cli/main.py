"""The frame of the `pitfs` command: finds the command, runs it, turns what went wrong into one line.

Each command is a module of this package (or an object in one) with `add_parser(subparsers)` and
`run(args) -> int`. Only the chosen one is imported: `pitfs list` must not pay for FUSE and TLS.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Final, Never, Protocol

from pitfs import __version__
from pitfs.errors import EXIT_FAILED, EXIT_USAGE, PitfsError

# Name of each command: where it is, what it does. In the order in which --help lists them.
COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "protect": ("pitfs.cli.protect", "serve the volumes of a configuration and replicate every write"),
    "snapshot": ("pitfs.cli.snapshot", "close the interval now and wait until the replica has it"),
    "bookmark": ("pitfs.cli.bookmark", "name the position of now"),
    "status": ("pitfs.cli.status", "where a side stands: lag, journal use, rate, last decision"),
    "receive": ("pitfs.cli.receive", "take what production hosts send into stores"),
    "list": ("pitfs.cli.list", "snapshots, intervals, bookmarks and gaps of a store"),
    "resolve": ("pitfs.cli.resolve", "the instant that a time leads to"),
    "digest": ("pitfs.cli.digest", "checksum of a volume at an instant"),
    "diff": ("pitfs.cli.diff", "what differs between two instants of a volume"),
    "export": ("pitfs.cli.export", "write a volume at an instant to a file or device"),
    "attach": ("pitfs.cli.attach", "a volume at an instant as a block device"),
    "detach": ("pitfs.cli.detach", "undo what attach did for a device"),
    "serve-nbd": ("pitfs.cli.serve_nbd", "serve a store's instants to NBD clients"),
    "check": ("pitfs.cli.later:check", "verify a store (not available in this version)"),
    "prune": ("pitfs.cli.later:prune", "apply the retention policy (not available in this version)"),
}
EXIT_INTERRUPTED: Final = 130  # 128 + SIGINT, as a shell has it
EXIT_BROKEN_PIPE: Final = 141  # 128 + SIGPIPE: what `| head` makes of other programs


class Command(Protocol):
    """What a command's module gives."""

    def add_parser(self, subparsers: argparse._SubParsersAction[Any], /) -> object: ...
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
        try:
            args = parser.parse_args(arguments)
        except SystemExit as stop:  # argparse has said what there is to say
            code = stop.code if isinstance(stop.code, int) else EXIT_USAGE
        else:
            verbose = bool(args.verbose)
            _set_up_logging(args.verbose)
            code = commands[args.command].run(args)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a full disk or a closed pipe can still be reported
        return code
    except BaseException as error:
        return report(error, verbose=verbose)


def fill_standard_descriptors() -> None:
    """Puts /dev/null where standard input, output or error is closed: else the next file that is opened, perhaps one
    of the store, would be what is written to."""
    while (descriptor := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def build_parser(names: Sequence[str]) -> tuple[argparse.ArgumentParser, dict[str, Command]]:
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
        if name in names:
            commands[name] = command = _load(name, place)
            command.add_parser(subparsers)
            _add_verbose(subparsers.choices[name], default=argparse.SUPPRESS)
        else:
            subparsers.add_parser(name, help=summary)
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
    parser.add_argument(
        "-v",
        "--verbose",
        action="count",
        default=default,
        help="say more on standard error; twice: everything",
    )


def _set_up_logging(verbose: int) -> None:
    if not verbose and "logging" not in sys.modules:
        return  # it takes 10 ms; a warning logged later reaches standard error all the same
    import logging

    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(level=level, stream=sys.stderr, format="pitfs: %(levelname)s: %(message)s")


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
            file.write(message)  # argparse swallows errors: help into a full disk would seem to be there
        else:
            super()._print_message(message, file)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            close = difflib.get_close_matches(str(value)[:64], action.choices, 1)
            hint = f" (did you mean '{close[0]}'?)" if close else ""
            raise argparse.ArgumentError(None, f"unknown command '{value}'{hint}")
        super()._check_value(action, value)


def report(error: BaseException, *, verbose: bool = False, program: str = "pitfs") -> int:
    """Says on standard error what went wrong, in one line; returns the exit code.

    Of a group of errors (several tasks failed) the most serious one counts: a mistake of ours, then an
    expected error, then the system's, then being interrupted.
    """
    first = min(_leaves(error), key=_rank)
    if isinstance(first, BrokenPipeError):
        _abandon_stdout()
        return EXIT_BROKEN_PIPE
    if isinstance(first, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    code = EXIT_FAILED
    if isinstance(first, PitfsError):
        message, code = str(first), first.exit_code
    elif isinstance(first, OSError):
        paths = [
            os.fsdecode(path) for path in (first.filename, first.filename2) if isinstance(path, str | bytes)
        ]
        message = ": ".join([*paths, first.strerror or str(first) or type(first).__name__])
        _abandon_stdout()  # what stands in its buffer may be what couldn't be written
    else:
        if verbose:
            import traceback  # 4 ms that only this case pays

            traceback.print_exception(error, file=sys.stderr)
        hint = "the traceback stands above" if verbose else "run it with -v for the traceback"
        message = f"{type(first).__name__} in {_place(first, error)}: {first}: this is a bug in pitfs; {hint}"
    print(one_line(f"{program}: {message}"), file=sys.stderr)
    return code


def one_line(text: str) -> str:
    """The text without line breaks and control characters: names and messages of a peer may hold any."""
    return "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in text.strip())


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from _leaves(part)
    else:
        yield error


def _rank(error: BaseException) -> int:
    for rank, kind in enumerate((PitfsError, OSError, KeyboardInterrupt), 1):
        if isinstance(error, kind):
            return rank
    return 0


def _place(error: BaseException, group: BaseException) -> str:
    """File and line where it (else its group) was raised, without what differs between machines."""
    trace = error.__traceback__ or group.__traceback__
    if trace is None:
        return "an unknown place"
    while trace.tb_next is not None:
        trace = trace.tb_next
    directory, name = os.path.split(trace.tb_frame.f_code.co_filename)
    return f"{os.path.basename(directory)}/{name}:{trace.tb_lineno}"


def _abandon_stdout() -> None:
    """So that Python doesn't try, and fail, to write the rest at exit."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    except (AttributeError, OSError, ValueError):  # no standard output, or one that isn't a file
        pass


if __name__ == "__main__":
    sys.exit(main())
