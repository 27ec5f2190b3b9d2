"""The frame of the command line: one line for whatever went wrong, and the right exit code."""

from __future__ import annotations

import argparse
import importlib
import shlex
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from pitfs import __version__
from pitfs.cli import main as frame
from pitfs.errors import CapacityError, CorruptionError, PitfsError, UsageError

Install = Callable[[Callable[[argparse.Namespace], int]], None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a command `try` in place whose run is the given function."""

    def put(run: Callable[[argparse.Namespace], int]) -> None:
        def add_arguments(parser: argparse.ArgumentParser) -> None:
            parser.add_argument("--json", action="store_true")

        module = SimpleNamespace(DESCRIPTION="", EXAMPLES="", add_arguments=add_arguments, run=run)
        monkeypatch.setitem(sys.modules, "pitfs_try", module)  # type: ignore[arg-type]
        monkeypatch.setattr(frame, "COMMANDS", {**frame.COMMANDS, "try": ("pitfs_try", "a test's command")})

    return put


def raising(error: BaseException) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


def test_the_commands_exit_code_is_the_programs(install: Install) -> None:
    install(lambda args: 1 if args.json else 0)
    assert frame.main(["try"]) == 0
    assert frame.main(["try", "--json"]) == 1


@pytest.mark.parametrize("argv", [["-v", "try"], ["try", "-v"], ["try", "--verbose"]])
def test_verbose_may_stand_on_either_side_of_the_command(install: Install, argv: list[str]) -> None:
    install(lambda args: int(args.verbose))
    assert frame.main(argv) == 1


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("no such name"), 2, "pitfs: no such name"),
        (CapacityError("journal is full"), 1, "pitfs: journal is full"),
        (CorruptionError("a.blocks", 4096, "checksum"), 1, "pitfs: a.blocks: damaged at byte 4096: checksum"),
        (PitfsError("two\nlines \x1b[31mred"), 1, "pitfs: two lines \\x1b[31mred"),
        (
            FileNotFoundError(2, "No such file or directory", "/x/y"),
            1,
            "pitfs: /x/y: No such file or directory",
        ),
        (OSError("odd"), 1, "pitfs: odd"),
        (ExceptionGroup("", [ExceptionGroup("", [UsageError("deep")])]), 2, "pitfs: deep"),
        (BaseExceptionGroup("", [KeyboardInterrupt(), UsageError("first")]), 2, "pitfs: first"),
    ],
)
def test_an_expected_error_is_one_line(
    install: Install, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    install(raising(error))
    assert frame.main(["try", "-v"]) == code
    captured = capsys.readouterr()
    assert captured.err == line + "\n"
    assert captured.out == ""


def test_a_mistake_of_ours_says_so_and_where(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install(raising(ExceptionGroup("", [UsageError("less"), KeyError("missing")])))
    assert frame.main(["try"]) == 1
    line = capsys.readouterr().err
    assert line.startswith("pitfs: KeyError in unit/test_cli_main.py:")
    assert line.endswith("this is a bug in pitfs; run it with -v for the traceback\n")
    assert line.count("\n") == 1
    assert frame.main(["try", "-v"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_being_interrupted_is_quiet(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install(raising(KeyboardInterrupt()))
    assert frame.main(["try"]) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "pitfs: the following arguments are required: COMMAND; see pitfs --help"),
        (["lst"], "pitfs: unknown command 'lst' (did you mean 'list'?); see pitfs --help"),
        (["xyz"], "pitfs: unknown command 'xyz'; see pitfs --help"),
        (["check"], "pitfs check: the following arguments are required: STORE; see pitfs check --help"),
        (["check", "/s", "--dat"], "pitfs: unrecognized arguments: --dat; see pitfs --help"),
    ],
)
def test_wrong_use_is_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str], argv: list[str], line: str
) -> None:
    assert frame.main(argv) == 2
    assert capsys.readouterr().err == line + "\n"


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert frame.main(["--version"]) == 0
    assert capsys.readouterr().out == f"pitfs {__version__}\n"
    assert frame.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n    {name} " in text for name in frame.COMMANDS)


@pytest.mark.parametrize("name", list(frame.COMMANDS))
def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert frame.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: pitfs {name} ")
    assert f"pitfs {name} " in text.partition("\n\n")[2], "no example"
    assert "-v, --verbose" in text


@pytest.mark.parametrize("name", list(frame.COMMANDS))
def test_every_command_is_where_the_table_says(name: str) -> None:
    module, _, attribute = frame.COMMANDS[name][0].partition(":")
    command = importlib.import_module(module)
    if attribute:
        command = getattr(command, attribute)
    assert f"pitfs {name} " in command.EXAMPLES and command.DESCRIPTION.endswith(".")


@pytest.mark.parametrize("name", ["list", "resolve", "digest", "export", "check", "prune"])
def test_commands_on_a_store_load_neither_fuse_nor_the_link(name: str) -> None:
    script = (
        f"import sys; from pitfs.cli.main import build_parser; build_parser([{name!r}]);"
        "print(*{'pyfuse3', 'trio', 'ssl', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_what_cannot_be_written_is_an_error_and_a_closed_pipe_is_not() -> None:
    command = [sys.executable, "-m", "pitfs.cli.main", "--help"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "pitfs: No space left on device\n")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_closed_standard_descriptors_are_no_place_for_files_of_ours() -> None:
    script = (
        "import os, sys; from pitfs.cli.main import main; code = main(['--version']); "
        "found = {os.readlink(f'/proc/self/fd/{number}') for number in range(3)}; "
        "os._exit(0 if code == 0 and found == {'/dev/null'} and sys.stdout and sys.stderr else 1)"
    )
    command = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(script)} <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], check=False).returncode == 0
