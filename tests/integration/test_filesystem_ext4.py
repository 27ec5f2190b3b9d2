"""ext4 on a loop device over the splitter: every instant is a disk that journal replay alone makes clean."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.filesystems import check_instants, protected_filesystem

pytestmark = [pytest.mark.timeout(180)]


def test_fifty_instants_of_ext4_are_clean_after_replay_and_have_exactly_the_rows(tmp_path: Path) -> None:
    with protected_filesystem("ext4", tmp_path, 64 << 20, load_s=15) as scenario:
        check_instants(scenario, 50)
        assert scenario.production.complaints() == []
        assert scenario.replica.complaints() == []
