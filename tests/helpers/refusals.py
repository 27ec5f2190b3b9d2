"""Wrong use, as a user meets it: one line on standard error, the contract's exit code, and no traceback."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pitfs.cli.common.shipper import ask_shipper
from pitfs.replication.control.requests import ReadStatus
from tests.helpers.hosts import Production
from tests.helpers.processes import ROOT, pitfs_command

TIMEOUT_S = 40.0


def refused(command: Sequence[str | Path], code: int, *words: str, timeout_s: float = TIMEOUT_S,
            stdout: int | None = subprocess.PIPE) -> str:  # fmt: skip
    """Runs a command that must fail with that code and one line with all the words; the line."""
    done = subprocess.run(
        [os.fspath(part) for part in command], stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE,
        text=True, cwd=ROOT, timeout=timeout_s, check=False,
    )  # fmt: skip
    return check_refusal(done, code, *words)


def pitfs_refused(code: int, *words: str, args: Sequence[str | Path]) -> str:
    """The same of `pitfs ARGS`."""
    return refused([*pitfs_command(), *args], code, *words)


def check_refusal(done: subprocess.CompletedProcess[str], code: int, *words: str) -> str:
    """The one line, after the checks."""
    assert done.stderr.count("\n") == 1 and done.stderr.endswith("\n"), done
    assert "Traceback" not in done.stderr and "bug in pitfs" not in done.stderr, done.stderr
    assert done.returncode == code, done
    assert not done.stdout, done.stdout
    for word in words:
        assert word in done.stderr, (word, done.stderr)
    return done.stderr


def together(*checks: Callable[[], object]) -> None:
    """Runs independent checks at the same time: most of each is the start of a Python."""
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(check) for check in checks]:
            future.result()


def status_of(production: Production) -> dict[str, Any]:
    """What `pitfs status --json` says, without a Python started for it: for polling."""
    return ask_shipper(str(production.config), ReadStatus())


def config_text(tmp: Path, volumes: Mapping[str, Path], *, replica: str = "127.0.0.1:1", group: str = "g",
                state: Path | None = None, mountpoint: Path | None = None, tls: str = "insecure = true",
                more: str = "") -> str:  # fmt: skip
    """A configuration; the replica is nowhere unless told."""
    lines = ["[group]", f'name = "{group}"', f'state = "{state or tmp / "state"}"']
    for name, backing in volumes.items():
        lines += [f"[volumes.{name}]", f'backing = "{backing}"']
    lines += ["[splitter]", f'mountpoint = "{mountpoint or tmp / "volumes"}"']
    lines += ["[replication]", f'replica = "{replica}"', 'interval = "2s"', more, "[tls]", tls]
    return "\n".join(lines) + "\n"


def write_config(tmp: Path, volumes: Mapping[str, Path], name: str = "c.toml", **options: object) -> Path:
    path = tmp / name
    path.write_text(config_text(tmp, volumes, **options))  # type: ignore[arg-type]
    return path
