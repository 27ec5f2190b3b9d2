"""What the tests start has default dispositions, although whoever runs the tests ignores SIGINT."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from tests.helpers.processes import ROOT


def ignored_by_a_child() -> set[int]:
    """Signals that a child ignores from its beginning."""
    mask = int(subprocess.check_output(["grep", "-oP", r"SigIgn:\s*\K.*", "/proc/self/status"], text=True), 16)
    return {number for number in range(1, 32) if mask >> (number - 1) & 1}


def test_a_child_does_not_ignore_ctrl_c() -> None:
    assert not ignored_by_a_child() & {signal.SIGINT, signal.SIGTERM, signal.SIGQUIT}


def test_neither_where_the_tests_run_in_the_background_of_a_script(tmp_path: Path) -> None:
    """Such a shell starts them with SIGINT ignored."""
    test = f"{Path(__file__).relative_to(ROOT)}::{test_a_child_does_not_ignore_ctrl_c.__name__}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'inner'}", test]
    script = 'trap "" INT QUIT; exec "$@"'
    done = subprocess.run(["sh", "-c", script, "sh", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
