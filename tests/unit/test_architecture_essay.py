"""pitfs/ARCHITECTURE.rst is held to the code: every file, name and constant in it is there, with the value it states."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT

PACKAGE = ROOT / "pitfs"
ESSAY = PACKAGE / "ARCHITECTURE.rst"
TEXT = ESSAY.read_text("utf-8")
LITERALS = re.findall(r"``([^`\n]+)``", TEXT)
# ``splitter/splitter.py:Splitter.write`` and ``store/objects/format.py:UNIT_BITS = 36``
PLACES = sorted({text for text in LITERALS if re.fullmatch(r"[\w/]+\.py(:[\w.]+)?( = .+)?", text)})
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


def test_every_room_is_described() -> None:
    rooms = {f"{path.name}/" for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert rooms <= set(ROOMS)
    for room in ROOMS:
        assert (PACKAGE / room).is_dir() or (ROOT / room).is_dir(), room


@pytest.mark.parametrize("way", ["write", "interval", "read", "restore"])
def test_the_ways_through_the_code_are_told_in_steps(way: str) -> None:
    section = re.search(rf"\nThe way of an? {way}\n-+\n(.*?)(?=\n[^\n]+\n-{{5,}}\n|\Z)", TEXT, re.DOTALL)
    assert section is not None
    steps = re.findall(r"^(?:#\.|\d+\.) .*?``([\w/]+\.py):[\w.]+``", section[1], re.MULTILINE | re.DOTALL)
    assert len(steps) >= STEPS_OF_A_WAY


def test_it_names_files_as_they_are_found_below_the_package() -> None:
    assert len(PLACES) > 60
    assert not [text for text in LITERALS if text.startswith("pitfs/") and text.endswith(".py")]


def test_names_are_found_in_classes_too() -> None:
    assert find("errors.py", "PitfsError.retryable") is not None
    assert find("errors.py", "PitfsError.nothing") is None
    assert Path("errors.py").suffix == ".py"
