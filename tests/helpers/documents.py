"""What README.rst and the manual tell people to type: their code blocks, and the commands in them."""

from __future__ import annotations

import itertools
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.processes import ROOT

README = ROOT / "README.rst"
MANUAL = ROOT / "pitfs" / "manual"
PAGES = sorted(MANUAL.glob("*.rst"))  # pitfs(1) is made from the parser and isn't among them
UNDERLINE = re.compile(r"([=~-])\1{2,}")


@dataclass(frozen=True, slots=True)
class Block:
    """A code block: its language, the document and the heading above it, its text without the indentation."""

    language: str
    document: str
    heading: str
    text: str


def page(name: str) -> str:
    """The source of a page, such as "pitfs.toml.5"."""
    return (MANUAL / f"{name}.rst").read_text(encoding="utf-8")


def sections(text: str) -> dict[str, str]:
    """Heading -> the text below it, up to the next heading."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if lines and UNDERLINE.fullmatch(line) and len(line) == len(lines[-1]):
            lines = found.setdefault(lines.pop(), [])
        else:
            lines.append(line)
    return {heading: "\n".join(content) for heading, content in found.items()}


def terms(section: str) -> list[str]:
    """What the terms of a section's definition lists say, without the marks around it."""
    lines = section.splitlines()
    return [
        term
        for line, below in itertools.pairwise(lines)
        if line.startswith("``") and below.startswith("    ")
        for term in re.findall("``([^`]+)``", line)
    ]


def blocks() -> list[Block]:
    """All code blocks, document by document, in order."""
    return [block for path in (README, *PAGES) for block in _blocks(path)]


def _blocks(path: Path) -> list[Block]:
    found: list[Block] = []
    heading, language, lines = "", "", list[str]()
    previous = ""
    for line in [*path.read_text(encoding="utf-8").splitlines(), "end"]:
        if language and (line.startswith("    ") or not line):
            lines.append(line[4:])
            continue
        if language:
            found.append(Block(language, path.stem, heading, "\n".join(lines).strip("\n") + "\n"))
            language, lines = "", []
        if UNDERLINE.fullmatch(line) and len(line) == len(previous):
            heading = previous
        if match := re.fullmatch(r"\.\. code-block:: (\w+)", line):
            language = match[1]
        previous = line
    return found


def commands(heading: str = "", document: str = "") -> list[list[str]]:
    """The words of each command of the shell blocks, of one section or of all, in one document or in all."""
    return [
        shlex.split(line)
        for block in blocks()
        if block.language == "sh" and heading in block.heading and document in ("", block.document)
        for line in block.text.replace("\\\n", " ").splitlines()
        if line
    ]


def fstab_lines() -> list[str]:
    """The lines that go into /etc/fstab, each once."""
    lines = (line for block in blocks() if block.language == "text" for line in block.text.splitlines())
    found = (line for line in lines if re.fullmatch(r"/\S+\s+/\S+\s+\w+\s+\S+\s+[0-9]\s+[0-9]", line))
    return list({" ".join(line.split()): line for line in found}.values())


def configurations() -> dict[str, str]:
    """Document -> the configuration of the production host in it."""
    return {block.document: block.text for block in _tomls() if block.text.startswith("[group]")}


def grants() -> str:
    """The replica's grants file."""
    (text,) = (block.text for block in _tomls() if block.text.startswith("[groups]"))
    return text


def _tomls() -> list[Block]:
    return [block for block in blocks() if block.language == "toml"]
