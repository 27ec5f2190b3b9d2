"""What every program of pitfs does with its standard streams: each is open, and an error is one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Final

from pitfs.errors import EXIT_FAILED, DiskFullError, PitfsError

EXIT_INTERRUPTED: Final = 130  # 128 + SIGINT, as shells report it
EXIT_BROKEN_PIPE: Final = 141  # 128 + SIGPIPE, as other programs end in `| head`


def fill_standard_descriptors() -> None:
    """Opens /dev/null where standard input, output or error is closed.

    Else the next file that is opened, perhaps one of the store, would get what is printed.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def report(error: BaseException, *, verbose: bool = False, program: str = "pitfs") -> int:
    """Prints on standard error what went wrong, in one line; returns the exit code.

    Of a group of errors (several tasks failed) the most serious one counts: a mistake of ours, then an
    expected error, then one of the system, then an interrupt.
    """
    first = min(_leaves(error), key=_rank)
    if isinstance(first, BrokenPipeError):
        _abandon_stdout()
        return EXIT_BROKEN_PIPE
    if isinstance(first, SystemExit):  # argparse has printed help or an error
        return first.code if isinstance(first.code, int) else EXIT_FAILED
    if isinstance(first, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    code = EXIT_FAILED
    if isinstance(first, PitfsError):
        message, code = first.ended if isinstance(first, DiskFullError) else str(first), first.exit_code
    elif isinstance(first, OSError):
        paths = [os.fsdecode(path) for path in (first.filename, first.filename2) if isinstance(path, str | bytes)]
        message = ": ".join([*paths, first.strerror or str(first) or type(first).__name__])
        if isinstance(first, PermissionError) and os.geteuid() != 0:
            message += ": run it as root, or as the owner"
        _abandon_stdout()  # its buffer may hold what could not be written
    else:
        import traceback  # 4 ms that only this case pays

        if verbose:
            traceback.print_exception(error, file=sys.stderr)
        frame = traceback.extract_tb(first.__traceback__ or error.__traceback__)[-1]  # what was caught has one
        place = "/".join(f"{frame.filename}:{frame.lineno}".split("/")[-2:])  # the rest differs between machines
        hint = "the traceback stands above" if verbose else "run it with -v for the traceback"
        message = f"{type(first).__name__} in {place}: {first}: this is a bug in pitfs; {hint}"
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
    kinds = PitfsError, OSError, KeyboardInterrupt
    return next((rank for rank, kind in enumerate(kinds, 1) if isinstance(error, kind)), 0)


def _abandon_stdout() -> None:
    """Keeps Python from writing the rest at exit, which would fail again."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    except (AttributeError, OSError, ValueError):  # no standard output, or one that is no file
        pass
