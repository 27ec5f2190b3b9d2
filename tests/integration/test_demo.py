"""tools/demo: what it shows is true, and it leaves nothing behind, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.conftest import left_loops, left_mounts
from tests.helpers.processes import ROOT

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.loop, pytest.mark.timeout(300)]


def start(place: Path, script: Path = ROOT / "tools" / "demo") -> subprocess.Popen[str]:
    """The demo without its set-up, in a session of its own, working below a directory with blanks in its name."""
    place.mkdir()
    return subprocess.Popen(
        [str(script), "--without-setup"], start_new_session=True, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | {"TMPDIR": str(place)},
    )  # fmt: skip


def left(place: Path) -> list[str]:
    marked = f"PITFS_DEMO={place}".encode()
    processes = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if marked in environment.read_bytes():
                processes.append(f"process {environment.parent.name}")
        except OSError:  # gone meanwhile
            continue
    return [*os.listdir(place), *left_mounts(place), *left_loops(place), *processes]


def test_it_ends_with_0_says_what_it_checked_and_leaves_nothing(tmp_path: Path) -> None:
    place = tmp_path / "a place with blanks"
    demo = start(place)
    said, _ = demo.communicate(timeout=240)
    assert demo.returncode == 0, said
    assert "All 15 checks were byte-exact" in said
    assert said.count("byte-exact  ") == 15
    assert "\x1b" not in said, "colours are for terminals"
    assert left(place) == []


def test_what_is_not_byte_exact_is_said_and_ends_it_with_1(tmp_path: Path) -> None:
    true = (ROOT / "tools" / "demo").read_text()
    noting = 'digests[$1]=$(digest volumes/root)'
    assert true.count(noting) == 1
    script = tmp_path / "tools" / "demo"
    script.parent.mkdir()
    script.write_text(true.replace(noting, f"{noting}; digests[$1]=0${{digests[$1]:1}}x"))
    script.chmod(0o755)
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    place = tmp_path / "place"
    demo = start(place, script)
    said, _ = demo.communicate(timeout=240)
    assert demo.returncode == 1
    assert "NOT byte-exact" in said
    assert left(place) == []


@pytest.mark.parametrize("moment", ["receive --root", "protect db1.toml", "--freeze", "--scratch"])
def test_ctrl_c_leaves_nothing(tmp_path: Path, moment: str) -> None:
    place = tmp_path / "place"
    demo = start(place)
    assert demo.stdout is not None
    for line in demo.stdout:
        if moment in line:
            break
    else:
        pytest.fail(f"the demo never came to {moment}")
    os.killpg(demo.pid, signal.SIGINT)
    said, _ = demo.communicate(timeout=120)
    assert demo.returncode in (130, 1), said
    assert "is left" not in said and "left mounted" not in said, said
    assert left(place) == []
