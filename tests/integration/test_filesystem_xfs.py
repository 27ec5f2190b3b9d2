"""xfs on a loop device over the splitter: its images replay, check clean, and have exactly the rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.filesystems import check_instants, protected_filesystem

pytestmark = [pytest.mark.timeout(120)]


def test_random_instants_of_xfs_are_clean_after_replay_and_have_exactly_the_rows(tmp_path: Path) -> None:
    with protected_filesystem("xfs", tmp_path, 320 << 20, load_s=6) as scenario:
        check_instants(scenario, 6)
        assert scenario.production.complaints() == []
        assert scenario.replica.complaints() == []
