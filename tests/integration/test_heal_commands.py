"""`pitfs check --heal` beside a receiver and a production host, as processes, and without either."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pitfs.store.objects.format import HEADER_BYTES
from tests.helpers.hosts import Production, Replica, digest
from tests.helpers.processes import pitfs_command, run
from tests.helpers.stores import object_files

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(120)]

SIZE = 256 << 10


def heal(store: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return run([*pitfs_command(), "check", store, "--heal", *options], accept=(0, 1))


def write(production: Production, start: int, size: int) -> bytes:
    data = os.urandom(size)
    fd = os.open(production.volume(), os.O_RDWR)
    os.pwrite(fd, data, start)
    os.fsync(fd)
    os.close(fd)
    return data


def with_history(production: Production, replica: Replica) -> dict[str, str]:
    """Two snapshots, one over half of the other; their digests."""
    instants = []
    for start in (0, SIZE // 4):
        write(production, start, SIZE // 2)
        instants.append(production.snapshot())
    return {instant: digest(replica.store(), instant) for instant in instants}


def damage(store: Path) -> None:
    """Every content of the store, and a file that is gone."""
    paths = object_files(store, "*.blocks")
    assert len(paths) > 1
    for path in paths:
        content = path.read_bytes()
        path.write_bytes(content[:HEADER_BYTES] + bytes(byte ^ 1 for byte in content[HEADER_BYTES:]))
    paths[-1].unlink()


def test_a_store_is_healed_while_it_is_received_into(tmp_path: Path) -> None:
    with Replica(tmp_path) as replica, Production(tmp_path, {"root": SIZE}, port=replica.port) as production:
        images, store = with_history(production, replica), replica.store()
        damage(store)
        report: dict[str, Any] = json.loads(heal(store, "--json").stdout)
        assert report["damaged"] == [] and report["healed"] > SIZE // 4096
        for instant, before in images.items():
            assert digest(store, instant) == before
        write(production, 0, 4096)
        production.snapshot()


def test_without_a_production_it_says_so_in_one_line_and_names_what_suffers(tmp_path: Path) -> None:
    with Replica(tmp_path) as replica:
        with Production(tmp_path, {"root": SIZE}, port=replica.port) as production:
            with_history(production, replica)
        store = shutil.copytree(replica.store(), tmp_path / "copy")  # nobody receives into that one
        for each, where in ((replica.store(), "the receiver is there"), (store, "nor that")):
            damage(each)
            done = heal(each)
            assert done.returncode == 1, where
            line = done.stderr.splitlines()[-1]
            assert f"{each}: " in line and "damaged contents wait for production, and none that can give them" in line
            assert "can't be read" in done.stdout
