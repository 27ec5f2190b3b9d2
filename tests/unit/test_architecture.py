"""The arrows between the rooms, the purity of the model, and the size of files and functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "pitfs"
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [path.relative_to(PACKAGE).as_posix() for path in FILES]
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 85

# The design's arrows. Who may import a room may import what that one stands on, too.
ARROWS: dict[str, set[str]] = {
    "": set(),  # pitfs/__init__.py
    "errors": set(),
    "model": {"errors"},
    "storage": {"model"},
    "store": {"storage"},
    "view": {"store"},
    "production": {"storage"},
    "link": {"model"},
    "fuse": {"production", "view"},
    "nbd": {"view"},
    "config_table": {"errors"},
    "config": {"config_table"},
    "cli": {"", "config", "fuse", "nbd", "production", "link", "store", "view"},
}


def reachable(room: str) -> set[str]:
    """The room itself and all that arrows from it lead to."""
    return {room}.union(*(reachable(below) for below in ARROWS[room]))


# What reaches outside the process, or tells the time, or throws dice.
IMPURE = {
    "apsw", "asyncio", "concurrent", "ctypes", "fcntl", "glob", "io", "logging", "mmap", "multiprocessing",
    "os", "pathlib", "pyfuse3", "random", "rich", "secrets",
    "select", "selectors", "shutil", "signal", "socket",
    "sqlite3", "ssl", "subprocess", "sys", "tempfile", "threading", "time", "trio", "uuid", "warnings",
}  # fmt: skip
CLOCKS = {"now", "utcnow", "today", "fromtimestamp"}  # of datetime: the last one asks for the local zone


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, wherever in it, relative ones resolved."""
    package = ["pitfs", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # "from pitfs import link" names a room, "from pitfs import __version__" none
            yield from (f"{module}.{alias.name}" if module == "pitfs" else module for alias in node.names)


def room(dotted: str) -> str:
    """pitfs.store.catalog -> store; pitfs.__version__ and pitfs itself -> "" """
    part = [*dotted.split("."), ""][1]
    return part if part in ARROWS else ""


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_arrows_between_the_rooms_go_one_way(path: Path) -> None:
    here = room_of(path)
    assert here in ARROWS, f"a new room: say in ARROWS what it stands on ({here})"
    used = {room(name) for name in imports(path) if name.split(".")[0] == "pitfs"}
    assert used <= reachable(here)


@pytest.mark.parametrize("path", [path for path in FILES if room_of(path) == "model"], ids=str)
def test_the_model_is_pure(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & IMPURE
    attributes = {
        node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
    }
    assert not attributes & CLOCKS
    names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
    assert not names & {"open", "print", "input"}


def test_the_protocols_do_no_io() -> None:
    for name in ("link/protocol.py", "link/frames.py", "nbd/protocol.py", "nbd/negotiation.py", "nbd/wire.py"):
        assert not {part.split(".")[0] for part in imports(PACKAGE / name)} & IMPURE


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text("utf-8")
    assert text.count("\n") <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, f"{node.name} is too long"


def test_production_link_and_store_know_nothing_of_each_other() -> None:
    for here in ("production", "link", "store"):
        assert reachable(here) & {"production", "link", "store", "cli", "config"} == {here}


def test_imports_are_found_wherever_they_stand() -> None:
    assert {"os", "pitfs.errors", "pitfs.__version__", "argparse"} <= set(
        imports(PACKAGE / "cli" / "main.py")
    )
    assert room("pitfs.store.catalog") == "store"
    assert room("pitfs.__version__") == "" == room("pitfs")
