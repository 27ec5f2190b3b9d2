"""The arrows between the rooms, the purity of the model, and the size of rooms, files and functions."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "pitfs"
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [path.relative_to(PACKAGE).as_posix() for path in FILES]
MAX_ROOM_LINES = 4_000  # of a room, or of a folder of one
MAX_FILES = 14  # of a folder
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 85

# The arrows of the design. A room that may import another one may import what that stands on, too.
ARROWS: dict[str, set[str]] = {
    "": set(),  # pitfs/__init__.py
    "errors": set(),
    "model": {"errors"},
    "storage": {"model"},
    "journal": {"storage"},
    "splitter": {"journal"},
    "link": {"model"},
    "replication": {"splitter", "journal", "link"},
    "store": {"storage"},
    "view": {"store"},
    "restore": {"view"},
    "fuse": {"splitter", "view"},
    "nbd": {"view"},
    "config": {"model"},
    "supervision": {"config", "fuse", "replication"},
    "cli": {"", "supervision", "restore", "nbd", "store", "view", "fuse", "link"},
}
# Imports that the arrows forbid and that are still there: (file, room).
PENDING: set[tuple[str, str]] = set()
PENDING_CIRCLES: list[list[str]] = []
PENDING_FOLDER_CIRCLES: dict[str, list[list[str]]] = {}


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
PURE_FOLDERS = ("model", "link/protocol", "link/codec")
PURE_FILES = ("nbd/protocol.py", "nbd/negotiation.py", "nbd/wire.py")


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, wherever in it, relative ones resolved."""
    package = ["pitfs", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # "from pitfs.link import sessions" names a folder or a module, "from pitfs import __version__" none
            for alias in node.names:
                full = f"{module}.{alias.name}"
                yield full if module_file(full) else module


def module_file(dotted: str) -> Path | None:
    """The file of a module of ours, or the __init__.py of a folder; None for anything else."""
    first, *parts = dotted.split(".")
    if first != "pitfs" or not parts:
        return None
    path = PACKAGE.joinpath(*parts)
    found = (path.with_suffix(".py"), path / "__init__.py")
    return next((each for each in found if each.is_file()), None)


def room(dotted: str) -> str:
    """pitfs.store.catalog -> store; pitfs.__version__ and pitfs itself -> "" """
    part = [*dotted.split("."), ""][1]
    return part if part in ARROWS else ""


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def ours(path: Path) -> set[str]:
    return {name for name in imports(path) if name.split(".")[0] == "pitfs"}


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_arrows_between_the_rooms_go_one_way(path: Path) -> None:
    here = room_of(path)
    assert here in ARROWS, f"a new room: say in ARROWS what it stands on ({here})"
    name = path.relative_to(PACKAGE).as_posix()
    against = {room(name) for name in ours(path)} - reachable(here)
    assert against == {to for file, to in PENDING if file == name}


@pytest.mark.parametrize("path", [path for path in FILES if room_of(path) == "model"], ids=str)
def test_the_model_is_pure(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & IMPURE
    attributes = {
        node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
    }
    assert not attributes & CLOCKS
    names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
    assert not names & {"open", "print", "input"}


def test_protocols_and_codecs_do_no_io() -> None:
    folders = [path for folder in PURE_FOLDERS for path in (PACKAGE / folder).rglob("*.py")]
    assert len(folders) > 10
    for path in (*folders, *(PACKAGE / name for name in PURE_FILES)):
        used = {part.split(".")[0] for part in imports(path)}
        assert not used & (IMPURE - {"sys"}), path  # sys tells the version of Python


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text("utf-8")
    assert text.count("\n") <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, f"{node.name} is too long"


def test_rooms_and_folders_stay_small() -> None:
    """A room that has folders is read folder by folder: then each of these counts for itself."""
    lines, files = Counter[Path](), Counter[Path]()
    for path in FILES:
        lines[path.parent] += path.read_text("utf-8").count("\n")
        files[path.parent] += path.name != "__init__.py"
    del lines[PACKAGE], files[PACKAGE]
    assert {path for path, count in lines.items() if count > MAX_ROOM_LINES} == set()
    crowded = {path for path, count in files.items() if count > MAX_FILES}
    assert crowded <= {PACKAGE / "cli"}  # one file for each command


def test_production_link_and_store_know_nothing_of_each_other() -> None:
    for here in ("splitter", "link", "store"):
        assert reachable(here) & {"splitter", "link", "store", "cli", "config"} == {here}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that lead to each other."""
    reach = {node: set(below) for node, below in graph.items()}
    for middle in graph:
        for node in graph:
            if middle in reach[node]:
                reach[node] |= reach[middle]
    rings = {
        tuple(sorted(other for other in reach[node] if node in reach[other]))
        for node in graph
        if node in reach[node]
    }
    return sorted(map(list, rings))


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports under TYPE_CHECKING and within functions count, too."""
    modules = {".".join(["pitfs", *path.relative_to(PACKAGE).with_suffix("").parts]): path for path in FILES}
    graph = {
        name: {other for other in ours(path) if other in modules and other != name}
        for name, path in modules.items()
    }
    assert circles(graph) == PENDING_CIRCLES


@pytest.mark.parametrize("here", sorted({name for name in ARROWS if (PACKAGE / name).is_dir() and name}))
def test_the_folders_of_a_room_stand_on_each_other_one_way(here: str) -> None:
    def folder(path: Path) -> str:
        return path.parent.relative_to(PACKAGE).as_posix()

    graph: dict[str, set[str]] = {}
    for path in (PACKAGE / here).rglob("*.py"):
        targets = graph.setdefault(folder(path), set())
        for name in ours(path):
            file = module_file(name)
            if file is not None and room_of(file) == here and folder(file) != folder(path):
                targets.add(folder(file))
    for targets in list(graph.values()):
        for target in targets:
            graph.setdefault(target, set())
    assert circles(graph) == PENDING_FOLDER_CIRCLES.get(here, [])


@pytest.mark.parametrize("path", [path for path in FILES if "__main__" in path.read_text()], ids=str)
def test_a_program_does_not_log_as_main(path: Path) -> None:
    """`python -m` names the module __main__: that says nothing in a log."""
    assert "getLogger(__name__)" not in path.read_text()


def test_imports_are_found_wherever_they_stand() -> None:
    assert {"sys", "pitfs.errors", "pitfs", "argparse"} <= set(imports(PACKAGE / "cli" / "main.py"))
    assert room("pitfs.store.catalog") == "store"
    assert room("pitfs.__version__") == "" == room("pitfs")
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"]]
