"""How many objects a reader keeps open: as many as it likes to, as far as the process may."""

from __future__ import annotations

import resource

import pytest

from pitfs.store.objects import pool as objects
from pitfs.store.objects.pool import MAX_OPEN_OBJECTS_READING, reading_limit


@pytest.mark.parametrize(
    ("soft", "hard", "raised_to", "limit"),
    [
        (1024, 1 << 20, MAX_OPEN_OBJECTS_READING + 256, MAX_OPEN_OBJECTS_READING),
        (1024, 4096, 4096, 4096 - 256),
        (1024, 1024, None, 1024 - 256),
        (1 << 20, 1 << 20, None, MAX_OPEN_OBJECTS_READING),
        (64, 64, None, 64),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None, MAX_OPEN_OBJECTS_READING),
        (1024, resource.RLIM_INFINITY, MAX_OPEN_OBJECTS_READING + 256, MAX_OPEN_OBJECTS_READING),
    ],
)
def test_the_soft_limit_is_raised_as_far_as_need_be(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, raised_to: int | None, limit: int
) -> None:
    now = [soft, hard]
    monkeypatch.setattr(objects.resource, "getrlimit", lambda which: tuple(now))
    monkeypatch.setattr(objects.resource, "setrlimit", lambda which, limits: now.__setitem__(slice(None), limits))
    assert reading_limit() == limit
    assert now == [soft if raised_to is None else raised_to, hard]


def test_where_it_may_not_be_raised_fewer_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(which: int, limits: tuple[int, int]) -> None:
        raise PermissionError

    monkeypatch.setattr(objects.resource, "getrlimit", lambda which: (1024, 1 << 20))
    monkeypatch.setattr(objects.resource, "setrlimit", refuse)
    assert reading_limit() == 1024 - 256
