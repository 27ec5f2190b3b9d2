"""A command of a user who may not read what it is about says so: it doesn't say that nothing is there or runs."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pitfs.cli.main import main
from tests.helpers.refusals import write_config

NOBODY = 65_534

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that others may look into: pytest's is not."""
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


def denied(capsys: pytest.CaptureFixture[str], path: Path, *args: str | Path) -> None:
    os.seteuid(NOBODY)
    try:
        code = main([os.fspath(each) for each in args])
    finally:
        os.seteuid(0)
    line = capsys.readouterr().err
    assert line == f"pitfs: {path}: permission denied: run it as root, or as the owner\n"
    assert code == 1


@pytest.mark.parametrize("args", [["status"], ["status", "--json"], ["snapshot"], ["bookmark", "noon"]])
@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_a_state_or_socket_of_another_user(
    place: Path, capsys: pytest.CaptureFixture[str], args: list[str], mode: int
) -> None:
    config = write_config(place, {"root": place / "backing"})
    state = place / "state"
    state.mkdir(mode)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.fspath(state / "control.sock"))
        (state / "control.sock").chmod(0o600)
        listening.listen(1)
        denied(capsys, state, args[0], config, *args[1:])


@pytest.mark.parametrize("args", [["status"], ["snapshot"], ["bookmark", "noon"], ["protect"]])
@pytest.mark.parametrize("hidden", ["file", "directory"])
def test_a_configuration_of_another_user(
    place: Path, capsys: pytest.CaptureFixture[str], args: list[str], hidden: str
) -> None:
    (place / "etc").mkdir()
    config = write_config(place / "etc", {"root": place / "backing"})
    (config if hidden == "file" else config.parent).chmod(0o600)
    denied(capsys, config, args[0], config, *args[1:])


@pytest.mark.parametrize("args", [["status"], ["list"], ["resolve", "latest"], ["digest", "latest", "root"]])
@pytest.mark.parametrize("hidden", ["store", "root"])
def test_a_store_of_another_user(
    place: Path, capsys: pytest.CaptureFixture[str], args: list[str], hidden: str
) -> None:
    store = place / "stores" / "db1"
    store.mkdir(parents=True)
    (store / "store.json").write_text("{}")
    (store if hidden == "store" else store.parent).chmod(0o700)
    told = store if hidden == "root" and args[0] == "status" else store / "store.json"
    denied(capsys, told, args[0], store, *args[1:])


def test_the_state_of_nobody_is_still_absent(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(place, {"root": place / "backing"})
    (place / "state").mkdir()
    assert main(["status", os.fspath(config)]) == 1
    assert "isn't running: start it first" in capsys.readouterr().err
