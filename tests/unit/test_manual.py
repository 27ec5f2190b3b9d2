"""The manual says what is so: it builds, its pages name each other, its options, keys, commands and limits are those
that there are."""

from __future__ import annotations

import ast
import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import docutils.core
import pytest

from pitfs.cli import mount
from pitfs.cli.main import COMMANDS, full_parser
from pitfs.config.production import load_config, parse_config
from pitfs.errors import ConfigError
from pitfs.fuse.mount.request import DEFAULT_WORKERS, MAX_WORKERS
from pitfs.model.group import MAX_VOLUMES
from pitfs.model.position import parse_time
from pitfs.nbd.server import MAX_CONNECTIONS
from pitfs.view.scratch import MAX_OVERLAYS
from tests.helpers.documents import MANUAL, PAGES, README, configurations, page, sections, terms
from tests.helpers.processes import ROOT

# A value for each option of -o that takes one.
SAMPLES = {"uid": "root", "gid": "root", "mode": "0440", "tz": "UTC", "scratch": "/var/tmp", "scratch_size": "10GiB"}
SAMPLES |= {"workers": "1"}


def build(path: Path, writer: str) -> str:
    settings = {"report_level": 2, "halt_level": 2, "syntax_highlight": "none", "input_encoding": "utf-8"}
    settings |= {"output_encoding": "unicode"}
    return docutils.core.publish_string(
        path.read_text(encoding="utf-8"), source_path=str(path), writer=writer, settings_overrides=settings
    )


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_each_page_builds_without_a_warning_and_has_what_a_page_has(path: Path) -> None:
    built = build(path, "manpage")
    name, _, section = path.stem.rpartition(".")
    assert f'.TH "{name}" "{section}" ' in built
    headings = [heading.strip('"').upper() for heading in re.findall(r"^\.SH (.*)$", built, re.MULTILINE)]
    assert headings[0] == "NAME" and headings[-1] == "SEE ALSO" and "DESCRIPTION" in headings
    assert ("SYNOPSIS" in headings) == (section == "8")
    assert re.search(rf"^{re.escape(name)} - \S", built.replace("\\-", "-"), re.MULTILINE)


def test_the_readme_builds_without_a_warning() -> None:
    assert "The night everything went wrong" in build(README, "pseudoxml")


def test_pages_name_pages_that_there_are() -> None:
    own = {path.stem for path in PAGES} | {"pitfs.1"}
    include = (MANUAL / "pitfs.1.include").read_text(encoding="utf-8").replace("\\", "")
    named = {f"{name}.{section}" for name, section in re.findall(r"^\.BR ([\w.-]+) \((\d)\)", include, re.MULTILINE)}
    assert {name for name in named if "pitfs" in name} == own - {"pitfs.1"}
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        named = {f"{name}.{section}" for name, section in re.findall(r"\*\*([\w.-]+)\*\*\\ \((\d)\)", text)}
        assert {name for name in named if "pitfs" in name} <= own
        assert "pitfs.1" in named
    for name, section in re.findall(r"``man (?:(\d) )?([\w.-]+)``", README.read_text(encoding="utf-8")):
        assert any(stem.startswith(f"{section}.{name}") for stem in own)


def test_each_file_of_the_manual_is_installed() -> None:
    setup = (ROOT / "tools" / "setup").read_text()
    assert "pitfs/manual/*.rst" in setup and "pitfs/manual/pitfs.1.include" in setup
    assert {path.suffix for path in MANUAL.iterdir()} == {".rst", ".include"}
    sections_made = re.search(r'"\$man"/man\{([\d,]+)\}', setup)
    assert sections_made is not None
    assert {path.stem.rpartition(".")[2] for path in PAGES} | {"1"} == set(sections_made[1].split(","))


# ------------------------------------------------------------------ mount.pitfs(8)


def test_the_options_of_a_mount_are_those_that_it_knows() -> None:
    text = sections(page("mount.pitfs.8"))["OPTIONS"]
    documented = {term.partition("=")[0] for term in terms(text)}
    assert documented == set(mount.VALUES) | mount.FLAGS
    assert {term.partition("=")[0] for term in terms(text) if "=" in term} == set(mount.VALUES) == set(SAMPLES)
    kernel, ignored, refused = (
        set(re.findall("``([^`]+)``", paragraph))
        for paragraph in text.split("\n\n")
        if paragraph.startswith("These ")
    )
    assert kernel == mount.KERNEL_OPTIONS
    assert ignored == mount.IGNORED | set(mount.IGNORED_PREFIXES)
    assert refused == set(mount.REFUSED)
    for name in documented:
        option = f"{name}={SAMPLES[name]}" if name in SAMPLES else name
        needed = "scratch=/var/tmp," if name.startswith("scratch_") else ""
        mount.parse_options(needed + option, store="/store", mountpoint="/mnt")
    with redirect_stdout(io.StringIO()) as help_text:
        assert mount.main(["--help"]) == 0
    flags = set(re.findall(r"^  (-\w)\b", help_text.getvalue(), re.MULTILINE)) - {"-h"}
    assert flags == set(re.findall(r"^(-\w)\b", sections(page("mount.pitfs.8"))["COMMAND LINE"], re.MULTILINE))


# ------------------------------------------------------------------ pitfs.toml(5)


def known_keys(text: str) -> set[str]:
    """The keys that the reader knows beside one that it doesn't: its message lists them."""
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "db1.toml")
    return set(str(caught.value).partition("known here: ")[2].split(", "))


def test_the_keys_of_the_configuration_are_those_that_are_read(tmp_path: Path) -> None:
    text, example = page("pitfs.toml.5"), configurations()["pitfs.toml.5"]
    tables = {heading[1:-1]: body for heading, body in sections(text).items() if heading.startswith("[")}
    assert known_keys(f"zzzzzzzz = 1\n{example}") == {table.partition(".")[0] for table in tables}
    for table, body in tables.items():
        header = f"[{table.replace('NAME', 'root')}]"
        entries = dict(term.split(" = ", 1) for term in terms(body) if " = " in term)
        assert known_keys(example.replace(header, f"{header}\nzzzzzzzz = 1")) == set(entries)
        for key, value in entries.items():  # each documented value is one that is taken
            lines = [line for line in example.splitlines() if not line.startswith(f"{key} = ")]
            lines.insert(lines.index(header) + 1, f"{key} = {value}")
            changed = "\n".join(lines)
            if key == "on_disconnect":
                changed = changed.replace('"dynamic"', '"sync"')
            if key == "insecure":
                changed = re.sub("^(certificate|key|authority) = .*\n?", "", changed, flags=re.MULTILINE)
                changed = changed.replace("replica.example", "localhost")
            path = tmp_path / "db1.toml"
            path.write_text(changed)
            load_config(str(path))


# ------------------------------------------------------------------ pitfs(1), pitfs(7)


def test_each_command_that_a_page_names_is_one() -> None:
    there = {name for name, (place, _) in COMMANDS.items() if "later:" not in place}
    for path in (README, *PAGES):
        text = re.sub(r"\*\*pitfs\*\*\\ \(\d\)", "", path.read_text(encoding="utf-8"))
        named = set(re.findall(r"(?:\*\*|``)pitfs\s([a-z-]+)", text))
        absent = set(COMMANDS) - there  # named as what this version lacks
        assert named <= there | absent
    for command in re.findall(r"``pitfs ([a-z-]+ --[^`]+)``", " ".join(page("pitfs.7").split())):
        assert command.split()[1] in full_parser_help(command.split()[0])


def test_the_page_of_the_commands_leads_to_all_others_and_says_what_is_there() -> None:
    include = (MANUAL / "pitfs.1.include").read_text(encoding="utf-8").replace("\\", "")
    for path in PAGES:
        name, _, section = path.stem.rpartition(".")
        subtitle = re.findall(r"^-{8,}\n(.*)\n-{8,}$", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert f".BR {name} ({section})\n{subtitle[0]}\n" in include
    named = re.findall(r"^\.B pitfs ([a-z-]+)", include, re.MULTILINE)
    assert len(named) >= 8 and set(named) <= set(COMMANDS), "in the order in which one needs them"


def test_each_key_of_a_status_is_explained(tmp_path: Path) -> None:
    """Of both sides: what `status --json` prints, and its text with blanks."""
    explained = set(terms(sections(page("pitfs.7"))["STATUS"]))
    sides = [
        strings_in(ROOT / "pitfs" / "replication" / "control" / "server.py", "status"),
        strings_in(ROOT / "pitfs" / "cli" / "status.py", "_replica"),
    ]
    assert all({"role", "protected_through", "last_decision", "holders"} <= side for side in sides)
    assert set.union(*sides) == explained


def strings_in(path: Path, function: str) -> set[str]:
    """The keys of the dict that a function returns."""
    (returned,) = (
        node.value
        for each in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef) and each.name == function
        for node in ast.walk(each)
        if isinstance(node, ast.Return)
    )
    assert isinstance(returned, ast.Dict)
    return {key.value for key in returned.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}


def strings_of(path: Path) -> list[str]:
    """The strings of a module that are no docstrings."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    return [
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    ]


def test_messages_say_full_sync_as_the_manual_does() -> None:
    wrong = [
        (path.name, text)
        for path in (ROOT / "pitfs").rglob("*.py")
        for text in strings_of(path)
        if re.search(r"(complete|full)\s+copy", text)
    ]
    assert wrong == []
    assert "*full sync*" in page("pitfs.7")


def test_how_long_a_stop_may_wait_is_what_the_unit_says() -> None:
    unit = (ROOT / "pitfs" / "data" / "pitfs-protect@.service").read_text(encoding="utf-8")
    assert "TimeoutStopSec=2min" in unit and "kills it after two minutes" in README.read_text(encoding="utf-8")


def full_parser_help(command: str) -> str:
    with redirect_stdout(io.StringIO()) as text, pytest.raises(SystemExit):
        full_parser().parse_args([command, "--help"])
    return text.getvalue()


def test_each_way_to_say_a_time_is_understood() -> None:
    ways = terms(sections(page("pitfs.7"))["WAYS TO SAY A TIME"])
    readme = sections(README.read_text(encoding="utf-8"))["The tree"].partition("say a time as")[2]
    ways += re.findall("``([^`]+)``", readme.partition(": it means")[0])
    assert len(ways) >= 15
    for way in ways:
        if way != "latest" and not way.startswith("bookmarks/"):
            parse_time(way, now_ns=10**18)


def test_the_figures_of_the_readme_are_those_of_the_manual() -> None:
    table = sections(README.read_text(encoding="utf-8"))["Measured"]
    rows = [line for line in table.splitlines() if re.search(r"  [0-9]+\.[0-9]{2}$", line)]
    assert len(rows) >= 5
    measured = set(re.findall(r"[0-9][0-9,.]*[0-9]", page("pitfs.7").partition("\nMEASURED\n")[2]))
    for row in rows:
        assert set(re.findall(r"[0-9][0-9,.]*[0-9]", row)) <= measured


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("README", f"{MAX_VOLUMES} volumes in a group"),
        ("pitfs.7", f"{MAX_VOLUMES} volumes in a group"),
        ("pitfs.7", f"At most {MAX_CONNECTIONS} NBD clients"),
        ("pitfs.toml.5", f"One table for each volume, at most {MAX_VOLUMES}"),
        ("mount.pitfs.8", f"1 to {MAX_WORKERS}. Default: one for each core, at most {DEFAULT_WORKERS}"),
        ("mount.pitfs.8", f"{MAX_OVERLAYS} written images"),
    ],
)
def test_limits_are_those_of_the_code(name: str, words: str) -> None:
    path = README if name == "README" else MANUAL / f"{name}.rst"
    assert words in " ".join(path.read_text(encoding="utf-8").split())
