"""pitfs/ARCHITECTURE.rst is held to the code: its files, names and constants are there, with the values it states."""

from __future__ import annotations

import ast
import configparser
import functools
import re
from collections.abc import Iterator

import docutils.core
import pytest
from docutils import nodes

from tests.helpers.processes import ROOT
from tests.unit.test_architecture import ARROWS

PACKAGE = ROOT / "pitfs"
ESSAY = PACKAGE / "ARCHITECTURE.rst"
TEXT = ESSAY.read_text("utf-8")
DOCUMENT = docutils.core.publish_doctree(
    TEXT, str(ESSAY), settings_overrides={"report_level": 2, "halt_level": 2}  # a warning is an error
)  # fmt: skip


def literals(node: nodes.Node) -> list[str]:
    """What stands between double backquotes, in order; white space of any kind is a space."""
    return [" ".join(literal.astext().split()) for literal in node.findall(nodes.literal)]


LITERALS = literals(DOCUMENT)
# ``splitter/splitter.py:Splitter.write`` and ``store/objects/format.py:UNIT_BITS = 36``
PLACE = re.compile(r"[\w/]+\.py(:[\w.]+)?( = .+)?")
PLACES = sorted({text for text in LITERALS if PLACE.fullmatch(text)} - {"tests/unit/test_architecture.py"})
ROOMS = sorted({text for text in LITERALS if re.fullmatch(r"[a-z_]+(/[a-z_]+)*/", text)})
STEPS_OF_A_WAY = 6  # the least that a way through the code takes


@functools.cache
def tree(name: str) -> ast.Module:
    return ast.parse((PACKAGE / name).read_text("utf-8"))


def find(name: str, dotted: str) -> ast.stmt | None:
    """The statement that defines a function, class, method, attribute or constant of a file."""
    body: list[ast.stmt] = tree(name).body
    found: ast.stmt | None = None
    for part in dotted.split("."):
        found = next((node for node in body if part in names_of(node)), None)
        if found is None:
            return None
        body = getattr(found, "body", [])
    return found


def names_of(node: ast.stmt) -> set[str]:
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return {node.name}
        case ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
        case ast.Assign():
            return {target.id for target in node.targets if isinstance(target, ast.Name)}
        case _:
            return set()


def value(node: ast.expr) -> object:
    """Of an expression of numbers and text, as constants are written."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name | ast.Call | ast.Attribute):
            raise ValueError(f"not a plain value: {ast.unparse(node)}")
    return eval(compile(ast.Expression(node), "constant", "eval"), {"__builtins__": {}})


def folders() -> set[str]:
    """All rooms, and the folders in them, as the essay writes them."""
    return {f"{path.parent.relative_to(PACKAGE)}/" for path in PACKAGE.rglob("*/__init__.py")}


def rows_of_rooms() -> Iterator[tuple[str, str, str]]:
    (table,) = DOCUMENT.findall(nodes.table)
    for row in next(iter(table.findall(nodes.tbody))).findall(nodes.row):
        name, what, imports = (entry.astext() for entry in row.findall(nodes.entry))
        yield name, what, imports


@pytest.mark.parametrize("place", PLACES)
def test_what_it_names_is_there(place: str) -> None:
    name, _, rest = place.partition(":")
    dotted, _, stated = rest.partition(" = ")
    assert (PACKAGE / name).is_file()
    if not dotted:
        return
    found = find(name, dotted)
    assert found is not None, f"{name} has no {dotted}"
    if stated:
        assert isinstance(found, ast.Assign | ast.AnnAssign) and found.value is not None
        assert value(found.value) == value(ast.parse(stated, mode="eval").body)


def test_every_room_is_described_and_every_folder_of_one() -> None:
    for room in ROOMS:
        assert (PACKAGE / room).is_dir() or (ROOT / room).is_dir(), room
    described = {name: what for name, what, _ in rows_of_rooms()}
    assert described.keys() == folders() | {"errors.py"}
    assert described.keys() <= {*ROOMS, "errors.py"}
    assert all(described.values())


def test_the_arrows_are_those_that_the_code_is_held_to() -> None:
    told = {name.removesuffix("/").removesuffix(".py"): imports for name, _, imports in rows_of_rooms() if imports}
    arrows = {room: ({*re.findall(r"\w+", imports)} - {"nothing"}) for room, imports in told.items()}
    assert arrows == {room: below - {""} for room, below in ARROWS.items() if room}


@pytest.mark.parametrize("way", ["write", "interval", "read", "restore"])
def test_the_ways_through_the_code_are_told_in_steps(way: str) -> None:
    heading = re.search(rf"\n(The way of an? {way})\n(-+)\n", TEXT)
    assert heading is not None and len(heading[1]) == len(heading[2])
    sections = [each for each in DOCUMENT.findall(nodes.section) if each[0].astext() == heading[1]]
    assert len(sections) == 1
    lists = list(sections[0].findall(nodes.enumerated_list))
    assert lists and len(lists[0].children) >= STEPS_OF_A_WAY
    for step in sections[0].findall(nodes.list_item):
        places = [text for text in literals(step) if PLACE.fullmatch(text)]
        assert any(":" in place for place in places), step.astext()


def test_it_names_files_as_they_are_found_below_the_package() -> None:
    assert len(PLACES) > 60
    assert not [text for text in LITERALS if text.startswith("pitfs/") and text.endswith(".py")]
    assert not list(DOCUMENT.findall(nodes.title_reference)), "a single backquote"
    assert max(map(len, TEXT.splitlines())) <= 120


def test_it_is_installed_with_the_package() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert ESSAY.name in setup["options.package_data"]["pitfs"].split(", ")


def test_names_are_found_in_classes_too() -> None:
    assert find("errors.py", "PitfsError.retryable") is not None
    assert find("errors.py", "PitfsError.nothing") is None
