"""What README.rst tells people to type: its code blocks, and the commands in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from tests.helpers.processes import ROOT


@dataclass(frozen=True, slots=True)
class Block:
    """A code block: its language, the heading above it, its text without the indentation."""

    language: str
    heading: str
    text: str


def blocks() -> list[Block]:
    """All code blocks, in order."""
    found: list[Block] = []
    heading, language, lines = "", "", list[str]()
    previous = ""
    for line in [*(ROOT / "README.rst").read_text(encoding="utf-8").splitlines(), "end"]:
        if language and (line.startswith("    ") or not line):
            lines.append(line[4:])
            continue
        if language:
            found.append(Block(language, heading, "\n".join(lines).strip("\n") + "\n"))
            language, lines = "", []
        if re.fullmatch(r"([=~-])\1{2,}", line) and len(line) == len(previous):
            heading = previous
        if match := re.fullmatch(r"\.\. code-block:: (\w+)", line):
            language = match[1]
        previous = line
    return found


def commands(heading: str = "") -> list[list[str]]:
    """The words of each command of the shell blocks, of one section or of all."""
    return [
        shlex.split(line)
        for block in blocks()
        if block.language == "sh" and heading in block.heading
        for line in block.text.replace("\\\n", " ").splitlines()
        if line
    ]


def fstab_lines() -> list[str]:
    """The lines that go into /etc/fstab."""
    lines = (line for block in blocks() if block.language == "text" for line in block.text.splitlines())
    return [line for line in lines if re.fullmatch(r"/\S+\s+/\S+\s+\w+\s+\S+\s+[0-9]\s+[0-9]", line)]


def configuration() -> str:
    """The configuration of the production host."""
    (text,) = (text for text in tomls() if text.startswith("[group]"))
    return text


def grants() -> str:
    """The replica's grants file."""
    (text,) = (text for text in tomls() if text.startswith("[groups]"))
    return text


def tomls() -> list[str]:
    return [block.text for block in blocks() if block.language == "toml"]
